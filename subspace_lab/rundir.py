"""Run folders: how they are named, which one `resume=auto` continues, and the lock that keeps two processes out of one.

A run writes `config_hash` when it starts and `results.json` with its `status` when it ends; that is all this reads.
No torch and no Lightning: the choice is made before they are imported.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace_lab.errors import UserError

HASH_FILE = "config_hash"
RESULTS_FILE = "results.json"
LOCK_FILE = ".lock"

# What a run has written when its first step begins; the row file then holds no row.
_BEFORE_TRAINING = frozenset(
    {".hydra", LOCK_FILE, HASH_FILE, RESULTS_FILE, "config.yaml", "command.txt", "environment.json", "run.log"}
)
_ROWS_FILE = "metrics.csv"


@dataclass(frozen=True)
class Found:
    """An earlier run (or sweep) of the same configuration."""

    path: Path
    completed: bool


def slurm_id() -> str | None:
    """Return the SLURM job's id, `ARRAYJOB_TASK` in an array, or None outside SLURM. A requeued job keeps it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or None


def restarts() -> int:
    """Return how often SLURM has requeued this job, or torchrun started these ranks again."""
    counts = (os.environ.get(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return max(int(count or 0) for count in counts)


def run_id() -> str:
    """Return the SLURM job's id if there is one, else the local time to the microsecond."""
    return slurm_id() or datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def run_name(usual: str, cfg: Any) -> str:
    """Return the name of a run: the usual one, or `<method>_checkpoints` where files are merged and nothing is trained.

    Args:
        usual: method, model and data.
        cfg: the whole configuration.
    """
    merge = cfg.get("merge")
    models = merge.get("models") if merge is not None else None
    # A list; by task, they are measured on the data.
    return f"{cfg.method.name}_checkpoints" if models is not None and not hasattr(models, "keys") else usual


def status(run_dir: Path) -> str | None:
    """Return the `status` in a run's results.json; None if it has none or the file is cut short."""
    try:
        results = json.loads((run_dir / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = results.get("status") if isinstance(results, dict) else None
    return found if isinstance(found, str) else None


def digest(run_dir: Path) -> str | None:
    """Return the hash a run or sweep folder was started with."""
    try:
        return (run_dir / HASH_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def newest(group: Path, wanted: str) -> Found | None:
    """Return the most recently started folder of `group` with this hash, finished or not."""
    candidates = [path.parent for path in group.glob(f"*/{HASH_FILE}") if digest(path.parent) == wanted]
    if not candidates:
        return None
    # The folder's name (a time or a job id) settles a tie of coarse file times, the same way on every rank.
    latest = max(candidates, key=lambda path: ((path / HASH_FILE).stat().st_mtime_ns, path.name))
    return Found(latest, status(latest) == "completed")


def unused(run_dir: Path, wanted: str) -> Path:
    """Return `run_dir`, or `run_dir-2`, `-3` … if it holds another run: two runs of one SLURM job share the id."""
    number = 1
    candidate = run_dir
    while digest(candidate) not in (None, wanted) or status(candidate) == "completed":
        number += 1
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    return candidate


def discard_unstarted(run_dir: Path) -> bool:
    """Remove the folder of a run that ended before its first step; return whether it did.

    A folder with anything else in it (a checkpoint, a row, somebody's own file) or with an earlier command stays.
    """
    if not _is_first_rank():
        return False
    try:
        if {path.name for path in run_dir.iterdir()} - _BEFORE_TRAINING - {_ROWS_FILE}:
            return False
        for name in (_ROWS_FILE, "command.txt"):
            file = run_dir / name
            if file.is_file() and len(file.read_text(encoding="utf-8").splitlines()) > 1:
                return False
        shutil.rmtree(run_dir)
        run_dir.parent.rmdir()  # the group's folder, and the one of all runs: only if they are empty now
        run_dir.parent.parent.rmdir()
    except OSError:
        pass
    if run_dir.exists():
        return False
    for handler in list(logging.getLogger().handlers):  # Hydra's, which would open run.log for the next message
        if Path(getattr(handler, "baseFilename", "/")).is_relative_to(run_dir):
            logging.getLogger().removeHandler(handler)
    return True


def owner() -> str:
    """Return who holds a lock: all ranks of one SLURM job are one owner."""
    job = slurm_id()
    return f"SLURM job {job}" if job else f"process {os.getpid()} on {socket.gethostname()}"


def check_free(run_dir: Path) -> None:
    """Refuse a folder that a living process of another owner is writing in.

    Raises:
        UserError: the folder is in use.
    """
    if not _is_first_rank():  # Lightning runs the command again for every other rank, in the first one's folder
        return
    with contextlib.suppress(OSError), open(run_dir / LOCK_FILE, encoding="utf-8") as file:
        holder = file.read().strip()
        if holder == owner():
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run_dir, holder) from None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel drops it with the process, so a killed run never blocks its own resumption.

    A record lock and not flock: that one would live on in the forked data loader workers of a killed run. Only the
    first rank takes it. On a file system without locks this does nothing.

    Raises:
        UserError: another process holds it.
    """
    if not _is_first_rank():
        yield
        return
    with open(run_dir / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(run_dir, file.read().strip()) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(owner())
        file.flush()
        yield


def _in_use(run_dir: Path, holder: str) -> UserError:
    return UserError(
        f"{run_dir} is being written by {holder or 'another process'}",
        hint="wait for it, or start another run with a different seed or name",
    )


def _is_first_rank() -> bool:
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") in ("", "0") for name in ranks)
