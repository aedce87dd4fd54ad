"""The process's place in a distributed run, and a quiet Lightning.

Rank and world size are needed before Lightning exists (to divide data between processes, to decide who writes files),
so they are read from the variables that launchers set: torchrun and Lightning's launcher (RANK, LOCAL_RANK), SLURM
(SLURM_PROCID). Lightning's launcher sets LOCAL_RANK in the children only once the first process has reached `fit`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Read when torch is loaded, hence set when this module is. DDP would warn, from C++ and in every process, that it found
# no unused parameter.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_RANK_VARIABLES = ("RANK", "SLURM_PROCID")
_INTERACTIVE_JOBS = ("bash", "interactive")

# Messages of Lightning, torch and their dependencies that say nothing a user of this program could act on. Each names
# its first words: anything new stays visible.
_KNOWN_WARNINGS = (
    r"The '?\w+_dataloader'? does not have many workers",
    r".*does not have many workers which may be a bottleneck",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The `srun` command is available on your system but is not used",
    r"Experiment logs directory .* exists and is not empty",
    r"You are using `torch.load` with `weights_only=False`",
    r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
    r"You requested .* but .* has no length",
    r"Your `IterableDataset` has `__len__` defined",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"`training_step` returned `None`",
    r"\[rank: ?\d+\] Seed set to",
    r"The epoch parameter in `scheduler.step\(\)`",
    r"It is recommended to use `self.log\('val/",  # the figures are reduced already
    r"barrier\(\): using the device under current context",
)


def global_rank(devices: int = 1) -> int:
    """Return this process's rank in the whole run, 0 when there is only one process.

    Args:
        devices: processes per machine, which Lightning's own launcher does not put into the environment.
    """
    if os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE_JOBS or "SLURM_NTASKS" not in os.environ:
        variables: tuple[str, ...] = tuple(v for v in _RANK_VARIABLES if not v.startswith("SLURM"))
    else:
        variables = _RANK_VARIABLES
    for variable in variables:
        if variable in os.environ:
            return int(os.environ[variable])
    return int(os.environ.get("NODE_RANK", 0)) * devices + local_rank()


def local_rank() -> int:
    """Return this process's rank among those of its machine."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE_JOBS:
        return int(os.environ.get("SLURM_LOCALID", 0))
    return 0


def is_main_process() -> bool:
    """Return whether this process writes files and prints."""
    return global_rank() == 0


def quiet_lightning() -> None:
    """Keep Lightning's start-up notes and known, harmless warnings off the console; errors and new warnings stay.

    Safe to call more than once. `lightning/__init__` also installs a console handler of its own, which would print
    every message a second time beside ours: it is removed.
    """
    root = logging.getLogger("lightning")
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's warnings about its own utilities go through a logger per module: quiet only INFO (devices, tips,
    # "`fit` stopped").
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils._pytree").addFilter(_not_about_enums)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime": compiling on a CPU
    for pattern in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    if warnings.showwarning is not _show_warning:
        global _show_others
        _show_others = warnings.showwarning
        warnings.showwarning = _show_warning


_PACKAGE = Path(__file__).resolve().parents[1]
_show_others: Any = None


def _show_warning(message: Any, category: type[Warning], filename: str, *more: Any, **named: Any) -> None:
    """Print a warning of our own as one plain line, without file and source line, and once per run."""
    if not Path(filename).is_relative_to(_PACKAGE) or not issubclass(category, UserWarning):
        _show_others(message, category, filename, *more, **named)
    elif is_main_process():
        print(f"note: {message}", file=sys.stderr)


def _not_about_enums(record: logging.LogRecord) -> bool:
    # torch about torchao, at the latter's import: nothing a user could change.
    return "is an Enum subclass" not in record.getMessage()


def slurm_plugin() -> Any | None:
    """Return Lightning's SLURM environment without its requeueing handler, or None if SLURM did not start this process.

    That handler saves from inside a signal handler and can hang with several ranks (Lightning issue 21406); our own
    flag is looked at between steps instead. Nor is it for torchrun's ranks, inside a SLURM job or not.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
