"""Where cells run: one after another in this process, in worker processes, or as jobs of a SLURM array.

Every executor hands back results as they come, in any order, and ends early with the exception of the first cell that
failed; what other cells have finished by then is in their folders.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.search.cells import CellResult, CellTask
from subspace_lab.search.running import CellFailure, attempt, failure_of, run_cell

Launcher = Literal["local", "joblib", "slurm"]
_POLL_SECONDS = 0.5
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(Protocol):
    """Runs cells.

    Attributes:
        parallel: how many at the same time.
    """

    parallel: int

    def run(self, tasks: Sequence[CellTask]) -> Iterator[CellResult]:
        """Yield the result of every task as it comes.

        Raises:
            UserError, Interrupted, MemoryError, RuntimeError: how the first failed cell ended.
        """
        ...

    def close(self) -> None:
        """Stop what is still running."""
        ...


class Local:
    """One cell after another, in this process."""

    parallel = 1

    def run(self, tasks: Sequence[CellTask]) -> Iterator[CellResult]:
        """Yield results in order."""
        for task in tasks:
            try:
                result = run_cell(task)
            except Interrupted:
                raise
            except Exception as error:
                raise failure_of(task, error).error() from error
            yield result

    def close(self) -> None:
        """Nothing goes on here."""


class Workers:
    """Processes of this machine, each of which imports once and lives for the whole search.

    Args:
        parallel: how many; each gets its share of the cores.
    """

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        self._pool: Any = None
        self._waiting: dict[Future[CellResult | CellFailure], CellTask] = {}

    def run(self, tasks: Sequence[CellTask]) -> Iterator[CellResult]:
        """Yield results as they come; a signal is handed on to the workers, which save and stop."""
        from joblib.externals.loky.process_executor import (
            TerminatedWorkerError,
        )

        with _armed():
            pool = self._start()
            waiting = self._waiting = {pool.submit(attempt, task): task for task in tasks}
            forwarded = False
            try:
                while waiting:
                    if interrupt.requested() is not None and not forwarded:
                        forwarded = True
                        self._stop()
                    done, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        waiting.pop(future)
                        if not future.cancelled():
                            yield _unwrap(future.result())
            except TerminatedWorkerError as error:
                raise UserError(
                    "a worker process died, most likely for want of memory",
                    hint=f"try fewer than protocol.workers={self.parallel}; finished cells are kept",
                ) from error
        if forwarded:
            raise Interrupted("interrupted between two cells")

    def _start(self) -> Any:
        if self._pool is None:
            from joblib.externals.loky import ProcessPoolExecutor

            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = str(max(1, cores // self.parallel))
            environment = {name: os.environ.get(name, threads) for name in _THREAD_VARIABLES}
            self._pool = ProcessPoolExecutor(
                max_workers=self.parallel, initializer=_only_take_note, env=environment, timeout=None
            )
        return self._pool

    def _stop(self) -> None:
        """Take back what has not begun and ask the rest to save and end."""
        import multiprocessing

        for future in self._waiting:
            future.cancel()
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)

    def close(self) -> None:
        """End the workers, waiting for those that save."""
        if self._waiting:
            self._stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


class Slurm:
    """Jobs of a SLURM array through submitit, one per cell; a job that is preempted is queued again and continues.

    Args:
        folder: submitit's files and logs.
        parallel: jobs at the same time.
        settings: parameters of submitit's AutoExecutor (slurm_partition, timeout_min, cpus_per_task …; null: unset),
            and `cluster`: slurm, or local for processes of this machine.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, or it does not know a setting.
    """

    def __init__(self, folder: Path, parallel: int, settings: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError(
                "protocol.launcher=slurm needs the package 'submitit'", hint="pip install submitit"
            ) from None
        self.parallel = parallel
        given = {name: value for name, value in settings.items() if value is not None}
        cluster = given.pop("cluster", "slurm")
        at_start = {name: given.pop(name) for name in ("slurm_max_num_timeout",) if name in given}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **at_start)
            self._executor.update_parameters(name="subspace-lab", slurm_array_parallelism=parallel, **given)
        except Exception as error:  # submitit raises bare RuntimeError, TypeError and NameError
            raise UserError(f"protocol.launcher=slurm: {' '.join(str(error).split())}") from error
        self._jobs: list[Any] = []

    def run(self, tasks: Sequence[CellTask]) -> Iterator[CellResult]:
        """Submit one array and yield results as jobs end."""
        with _armed():
            try:
                self._jobs = self._executor.map_array(CellJob(), tasks)
            except Exception as error:  # submitit's own: sbatch has refused
                raise UserError(f"protocol.launcher=slurm: {' '.join(str(error).split())}") from error
            waiting = dict(zip(self._jobs, tasks, strict=True))
            while waiting:
                if interrupt.requested() is not None:
                    raise Interrupted("interrupted while jobs were running; they are cancelled")
                ended = [job for job in waiting if job.done()]
                for job in ended:
                    task = waiting.pop(job)
                    yield _unwrap(_result_of(job, task))
                if waiting and not ended:
                    time.sleep(_POLL_SECONDS)
        self._jobs = []

    def close(self) -> None:
        """Cancel the jobs that are left."""
        for job in self._jobs:
            if not job.done():
                job.cancel()
        self._jobs = []


class CellJob:
    """What a cluster job calls."""

    def __call__(self, task: CellTask) -> CellResult | CellFailure:
        """Run the cell; before a time limit or preemption it is saved, and submitit queues the job again."""
        interrupt.install()
        ended = attempt(task)
        if isinstance(ended, CellFailure) and ended.kind == "interrupted":
            interrupt.chain()
        return ended

    def checkpoint(self, task: CellTask) -> Any:
        """Return what is submitted again (submitit calls this)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


def create(launcher: Launcher, *, workers: int, slurm: Mapping[str, Any], run_dir: Path) -> Executor:
    """Return the executor of a launcher.

    Args:
        launcher: local, joblib (processes of this machine) or slurm.
        workers: cells at the same time, unless local.
        slurm: see `Slurm`.
        run_dir: the run folder, where SLURM's logs go.
    """
    if launcher == "joblib":
        return Workers(workers)
    return Slurm(run_dir / "slurm", workers, slurm) if launcher == "slurm" else Local()


def _result_of(job: Any, task: CellTask) -> CellResult | CellFailure:
    try:
        ended: CellResult | CellFailure = job.result()
    except Exception as error:  # the job was killed or never began: submitit's message has its last lines of output
        return CellFailure(task, "bug", f"job {job.job_id} ended without a result: {str(error).splitlines()[0]}")
    return ended


def _unwrap(ended: CellResult | CellFailure) -> CellResult:
    if isinstance(ended, CellFailure):
        raise ended.error()
    return ended


class _armed:
    """While this process only waits for others, a signal is noted and does not tear it out of the waiting."""

    def __enter__(self) -> None:
        self._before = interrupt.request.armed
        interrupt.request.armed = True

    def __exit__(self, *exception: object) -> None:
        interrupt.request.armed = self._before


def _only_take_note() -> None:
    """In a worker: Ctrl-C reaches the whole terminal, and the parent decides; a running cell saves and ends."""

    def note(signum: int, frame: FrameType | None) -> None:
        interrupt.request.signal = signum

    interrupt.install()
    for signum in interrupt.WATCHED:
        signal.signal(signum, note)
