"""Between a sweeper and its launcher: only unfinished cells are launched, and one that dies takes no other along.

Hydra's sweepers hand a launcher lists of overrides and want a figure for each. Which cells there are is written to
sweep.json, how each ended is read from its results.json, whatever process, node or earlier command it ran in: a
launcher's own return values and exceptions are not relied on.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from typing_extensions import override

from subspace_lab import interrupt, rundir, schema
from subspace_lab.composed import hydra_config, without_hydra
from subspace_lab.errors import Interrupted
from subspace_lab.sweeps import failures, manifest, queues
from subspace_lab.sweeps.manifest import Cell
from subspace_lab.sweeps.overrides import quote

log = logging.getLogger(__name__)


@contextmanager
def cells_first() -> Iterator[None]:
    """Let the next sweeper get its launcher with `Cells` before it.

    Hydra takes launchers from its own packages only, by name; what it makes of one is handed on here, once: the
    launchers pickle Hydra's state for their jobs.
    """
    plugins = Plugins.instance()

    def instantiate_launcher(**parts: Any) -> Launcher:
        vars(plugins).pop("instantiate_launcher", None)
        return Cells(plugins.instantiate_launcher(**parts), parts["config"], parts["hydra_context"])

    vars(plugins)["instantiate_launcher"] = instantiate_launcher
    try:
        yield
    finally:
        vars(plugins).pop("instantiate_launcher", None)


class Cells(Launcher):
    """Gives a launcher what is still to be done.

    Args:
        launcher: the one that the configuration names.
        config: the sweep's.
        hydra_context: composes the configurations of jobs.
    """

    def __init__(self, launcher: Launcher, config: DictConfig, hydra_context: HydraContext) -> None:
        self.launcher = launcher
        self.config = config
        self.hydra_context = hydra_context

    @override
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the launcher was set up when it was made."""

    @override
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the cells that have no results yet.

        Args:
            job_overrides: of each job.
            initial_job_idx: how many jobs the sweeper has launched before.

        Returns:
            For each job the figure that the sweep minimises; None if it failed or diverged.

        Raises:
            Interrupted: Ctrl-C, once the running cells are saved.
        """
        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        known = manifest.read(sweep_dir)
        if known is None:  # estimate=true
            return self.launcher.launch(job_overrides, initial_job_idx)
        cells = self._cells(job_overrides, initial_job_idx, sweep_dir, known)
        pending = list({c.folder: c for c in cells if rundir.status(sweep_dir / c.folder) != "completed"}.values())
        done = len({c.folder for c in cells}) - len(pending)
        if done:
            borrowed = len({c.folder for c in cells if c.folder.startswith("..")})
            where = f", {borrowed} of them in earlier sweeps" if borrowed else ""
            log.info(f"{done} of {done + len(pending)} cells are finished already{where}")
        if pending:
            with _patient(str(self.config.hydra.launcher._target_)):
                self._launch_all(pending, initial_job_idx, sweep_dir)
        if interrupt.requested() == signal.SIGINT:
            raise Interrupted("interrupted")
        return [_returned(sweep_dir, cell) for cell in cells]

    def _cells(
        self,
        job_overrides: Sequence[Sequence[str]],
        first: int,
        sweep_dir: Path,
        known: manifest.Manifest,
    ) -> list[Cell]:
        """Give each job its folder, and write them down.

        With resume=auto that is where a cell of the same hash lies already: in this sweep, or finished in another.
        """
        resumed = self.config.get("resume") == "auto"
        mine = {cell.config_hash: cell for cell in known.cells} if resumed or first else {}
        root = Path(str(self.config.paths.output_root)).absolute()
        elsewhere = dict(manifest.finished_elsewhere(sweep_dir, root)) if resumed else {}
        cells = []
        for number, overrides in enumerate(job_overrides, start=first):
            job = self._compose(overrides, number)
            wanted = schema.config_hash(without_hydra(job, run_dir=sweep_dir / str(number)))
            cell = mine.get(wanted)
            if cell is None and wanted in elsewhere:
                cell = Cell(os.path.relpath(elsewhere[wanted], sweep_dir), list(overrides), wanted)
            if cell is None:
                taken = {own.folder for own in mine.values()}
                cell = Cell(_unused(_subdir(job), taken), list(overrides), wanted)
            mine[wanted] = cell
            cells.append(cell)
        known.cells = list({cell.folder: cell for cell in [*mine.values()]}.values())
        manifest.write(sweep_dir, known)
        return cells

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        job: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(job):
            job.hydra.job.num = number
            job.hydra.job.id = str(number)
        return job

    def _launch_all(self, pending: Sequence[Cell], first: int, sweep_dir: Path) -> None:
        """Launch cells, and go on where a process dies without a word.

        With joblib all others die with it: whatever ran gets a second try, one by one, so that it is known which it is.
        """
        batches = [list(pending)]
        while batches:
            batch = batches.pop(0)
            begun = time.time()
            jobs = [[*cell.overrides, f"hydra.sweep.subdir={quote(cell.folder)}"] for cell in batch]
            try:
                self.launcher.launch(jobs, first)
            except Exception as error:
                alone = len(batch) == 1 or queues.outlived(sweep_dir, begun)
                started = [cell for cell in batch if failures.started_since(sweep_dir / cell.folder, begun)]
                stranded = [cell for cell in started if not failures.ended_since(sweep_dir / cell.folder, begun)]
                if not stranded:
                    raise  # nothing ran: the launcher itself is at fault
                if alone:
                    words = f"its process died: {type(error).__name__} (killed, or out of memory?)"
                    for cell in stranded:
                        failures.record(sweep_dir / cell.folder, words, cell.overrides, cell.config_hash)
                    continue
                log.warning(f"a process died; {len(stranded)} cells are tried again, one by one")
                waiting = [cell for cell in batch if cell not in started]
                batches += [*([waiting] if waiting else []), *([cell] for cell in stranded)]


@contextmanager
def _patient(target: str) -> Iterator[None]:
    """Let Ctrl-C wait while other processes run the cells: they have it too, and save."""
    if "basic_launcher" in target or "slurm" in target.lower():
        yield  # our own process saves; jobs in a queue go on without us
        return
    before = interrupt.request.armed
    interrupt.request.armed = True
    try:
        yield
    finally:
        interrupt.request.armed = before


def _subdir(job: DictConfig) -> str:
    holder = HydraConfig.instance()
    assert holder is not None
    with hydra_config(job):
        return str(OmegaConf.select(job, "hydra.sweep.subdir"))


def _unused(folder: str, taken: set[str]) -> str:
    """Return `folder`, or the first number that no cell has."""
    if folder not in taken:
        return folder
    return next(str(n) for n in range(len(taken) + 1) if str(n) not in taken)


def _returned(sweep_dir: Path, cell: Cell) -> JobReturn:
    found = failures.results(sweep_dir / cell.folder)
    value = found.get("metrics", {}).get(found.get("objective", "")) if found.get("status") == "completed" else None
    figure = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    return JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED, _return_value=figure)
