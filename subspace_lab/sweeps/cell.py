"""One cell inside its sweep: whatever goes wrong in it is written down, and the sweep goes on."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from subspace_lab import interrupt, rundir, schema
from subspace_lab.errors import Interrupted
from subspace_lab.sweeps import failures
from subspace_lab.training.environment import is_main_process

log = logging.getLogger(__name__)


def run_cell(cfg: DictConfig, hydra_cfg: Any, run_dir: Path, work: Callable[[], float | None]) -> float | None:
    """Do a cell's work; return its figure, None if it failed.

    A signal ends the whole sweep where the cells run in the process the user started. In any other process the cell
    alone ends here, saved, and that process is given no further one.

    Args:
        cfg: its configuration.
        hydra_cfg: Hydra's own.
        run_dir: its folder.
        work: what it does.

    Raises:
        Interrupted: the sweep is to stop.
    """
    ours = "basic_launcher" in str(OmegaConf.select(hydra_cfg, "launcher._target_"))
    if not ours and interrupt.requested() == signal.SIGINT:
        return None
    begun = time.time()
    try:
        return work()
    except (Interrupted, KeyboardInterrupt) as stopped:
        interrupt.chain()  # submitit requeues the job here, and ends the process
        if ours:
            raise
        log.warning(f"{run_dir}: {stopped or 'interrupted'}")
        return None
    except Exception as error:
        write_traceback(run_dir, error)
        message = first_line(error)
        log.error(f"{run_dir}: {message}")
        told = failures.ended_since(run_dir, begun) and rundir.status(run_dir) != "completed"
        if is_main_process() and not told:  # it ended before it could, or after its results: in a plot, say
            _record(cfg, hydra_cfg, run_dir, message)
        return None


def write_traceback(run_dir: Path, error: Exception) -> None:
    """Append an exception's traceback to run.log, and let the exception know where it is."""
    with contextlib.suppress(OSError), open(run_dir / "run.log", "a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    if not hasattr(error, "log_path"):
        error.log_path = run_dir / "run.log"  # type: ignore[attr-defined]


def first_line(error: BaseException) -> str:
    """Return what results.json says of an exception."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _record(cfg: DictConfig, hydra_cfg: Any, run_dir: Path, message: str) -> None:
    digest = ""
    with contextlib.suppress(Exception):  # it may be what could not be resolved
        digest = schema.config_hash(cfg)
    chosen = {
        str(group): name for group, name in hydra_cfg.runtime.choices.items() if not str(group).startswith("hydra")
    }
    with contextlib.suppress(OSError):  # a full disk: the report says `not started`
        failures.record(
            run_dir, message, [*map(str, hydra_cfg.overrides.task)], digest, chosen, OmegaConf.select(cfg, "seed")
        )
        if digest and rundir.digest(run_dir) is None:
            (run_dir / rundir.HASH_FILE).write_text(f"{digest}\n", encoding="utf-8")
