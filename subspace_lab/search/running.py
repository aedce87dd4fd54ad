"""Runs one cell in its folder, in whatever process; importable by workers and cluster jobs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf, open_dict

from subspace_lab import build, interrupt, rundir
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.reporting.record import status_of
from subspace_lab.search.cells import CellResult, CellTask, read_result, write_result
from subspace_lab.training import environment

ERROR_FILE = "error.log"
CHECKPOINTS = "checkpoints"  # `training.CHECKPOINTS`; that module imports Lightning, which a cell read needs not
_POLL_SECONDS = 0.5


def run_cell(task: CellTask) -> CellResult:
    """Train one cell, or continue it, or read its figures if another process has just finished it.

    Raises:
        UserError, Interrupted and whatever else ends a training run.
    """
    if interrupt.requested() is not None:
        raise Interrupted("interrupted between two cells")
    task.folder.mkdir(parents=True, exist_ok=True)
    with _alone(task.folder):
        found = read_result(task)
        if found is not None:
            return found
        began = time.perf_counter()
        cfg = OmegaConf.create(dict(task.config))
        if any(task.folder.glob(f"{CHECKPOINTS}/*.ckpt")):
            with open_dict(cfg):
                cfg.resume = "auto"
        main = environment.is_main_process()
        if main:
            (task.folder / "config.json").write_text(json.dumps(task.config, indent=2, default=str) + "\n")
        outcome = build.instantiate(cfg.protocol).run(
            cfg, task.folder, label=str(task.spec), resume_dir=task.resume_dir
        )
        metrics = {str(name): float(value) for name, value in outcome.metrics.items()}
        result = CellResult(task.spec, task.key, task.folder, metrics, time.perf_counter() - began)
        if main:
            write_result(result, {"timing": outcome.timing, "versions": _versions()})
            shutil.rmtree(task.folder / CHECKPOINTS, ignore_errors=True)
            (task.folder / ERROR_FILE).unlink(missing_ok=True)
        return result


@dataclass(frozen=True)
class CellFailure:
    """How a cell ended that did not finish, in a form that passes between processes.

    Attributes:
        task: the cell.
        kind: user: something to mend in the configuration; bug: anything else.
        message: what was wrong, in one line.
        hint: what to do about it.
    """

    task: CellTask
    kind: Literal["interrupted", "user", "out_of_memory", "bug"]
    message: str
    hint: str | None = None

    def error(self) -> Exception:
        """Return the exception with which the search ends."""
        where = f"{self.task.spec}, in {self.task.folder}"
        if self.kind == "interrupted":
            return Interrupted(self.message)
        if self.kind == "user":
            return UserError(f"{self.message} [{where}]", hint=self.hint)
        if self.kind == "out_of_memory":
            return MemoryError(f"{self.message} [{where}]")
        return RuntimeError(f"{self.message} [{where}/{ERROR_FILE}]")


def attempt(task: CellTask) -> CellResult | CellFailure:
    """Run one cell and return how it ended; a traceback stays in the cell's folder."""
    try:
        return run_cell(task)
    except (Exception, KeyboardInterrupt) as error:
        return failure_of(task, error)


def failure_of(task: CellTask, error: BaseException) -> CellFailure:
    """Return the failure that an exception is."""
    status = status_of(error)
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if status == "interrupted":
        return CellFailure(task, "interrupted", message)
    if isinstance(error, UserError):
        return CellFailure(task, "user", error.message, error.hint)
    with contextlib.suppress(OSError):
        (task.folder / ERROR_FILE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    if status == "out_of_memory":
        return CellFailure(task, "out_of_memory", message)
    return CellFailure(task, "bug", f"{type(error).__name__}: {message}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the cell's lock, waiting for another search that trains the very same cell."""
    if not environment.is_main_process():
        yield  # the first rank holds it for all
        return
    with open(folder / rundir.LOCK_FILE, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if interrupt.requested() is not None:
                    raise Interrupted("interrupted while waiting for another search") from None
                time.sleep(_POLL_SECONDS)
            except OSError:
                break  # a file system without locks: at worst the same figures are computed twice
        yield


@functools.cache
def _versions() -> dict[str, Any]:
    from importlib import metadata

    from subspace_lab._version import __version__
    from subspace_lab.reporting.environment import git_revision

    return {
        "subspace-lab": __version__,
        "torch": metadata.version("torch"),
        "git": git_revision(Path(__file__).resolve().parents[1] / "reporting"),
    }
