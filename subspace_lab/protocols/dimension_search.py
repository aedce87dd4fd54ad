"""`protocol=dimension_search`: the smallest random subspace in which training reaches a fraction of the baseline.

Li, Farkhoor, Liu & Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv 1804.08838:
d_int90 is the smallest d whose solutions exceed 90 % of a baseline. Two baselines are in use and give different
numbers: `global`, one accuracy for all models (1.0 for MNIST; the published 750 and 290), and `own`, what this very
model reaches when all its weights are trained. Both are reported, each with its interval over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace_lab.cluster.settings import for_submitit
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.search import executors
from subspace_lab.search.cells import CellFactory
from subspace_lab.search.engine import Plan, Search
from subspace_lab.search.learning_rates import Ladder
from subspace_lab.search.progress import Display

if TYPE_CHECKING:
    from omegaconf import DictConfig

FIT = {"_target_": "subspace_lab.protocols.fit.Fit", "train_accuracy": False}


class DimensionSearch:
    """Searches `method.d`. Baseline first, then subspaces; each at its best learning rate, over several seeds.

    Args:
        grid: try exactly these d; null gallops over d_min · ratioᵏ and bisects.
        d_min: the smallest d.
        d_max: the largest d, from whose projection all others are cut; null: see `search.grid.default_d_max`.
        ratio: of neighbouring grid points.
        resolution: bisection ends when the upper end of a bracket is at most 1 + resolution times the lower one.
        seeds: runs per d, with seeds seed, seed + 1, …: of the initial weights, the projection and the data's order.
        lr_factors: factors of the learning rate to choose from, at the first seed; one more is tried beyond an edge.
        fraction: of the baseline that has to be exceeded.
        global_baseline: the accuracy that counts as the baseline of every model; null: only the own baseline.
        metric: the figure that is compared.
        select: the figure by which learning rates are chosen (validation data, so that `metric` stays unseen).
        confidence: of the bootstrap interval over seeds.
        bootstrap: resamples.
        continuation: cold starts every run at z = 0; warm at the solution of the next smaller d.
        launcher: local: one run after another; joblib: in worker processes; slurm: a job each.
        workers: runs at the same time, unless local.
        slurm: parameters of submitit's AutoExecutor, e.g. slurm_partition, timeout_min; null is what `cluster` says.
        cell: the node of the protocol that trains a single cell; null is `fit`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        grid: Sequence[int] | None = None,
        d_min: int = 1,
        d_max: int | None = None,
        ratio: float = 1.5,
        resolution: float = 0.15,
        seeds: int = 3,
        lr_factors: Sequence[float] = (1 / 3, 1.0, 3.0),
        fraction: float = 0.9,
        global_baseline: float | None = None,
        metric: str = "test/accuracy",
        select: str = "val/accuracy",
        confidence: float = 0.9,
        bootstrap: int = 1000,
        continuation: Literal["cold", "warm"] = "cold",
        launcher: executors.Launcher = "local",
        workers: int = 1,
        slurm: Mapping[str, Any] | None = None,
        cell: Mapping[str, Any] | None = None,
    ) -> None:
        for name, number, least in (
            ("d_min", d_min, 1),
            ("seeds", seeds, 1),
            ("workers", workers, 1),
            ("bootstrap", bootstrap, 1),
            ("d_max", d_max, d_min),
            *((f"grid={list(grid or [])}: {d}", d, 1) for d in grid or []),
        ):
            if number is not None and number < least:
                raise UserError(f"protocol.{name}={number}: expected at least {least}")
        if grid is not None and not grid:
            raise UserError("protocol.grid has no d in it", hint="grid=null searches by itself")
        if d_max is not None and max(grid or [1]) > d_max:
            raise UserError(f"protocol.grid goes beyond protocol.d_max={d_max}")
        if ratio <= 1:
            raise UserError(f"protocol.ratio={ratio}: expected more than 1")
        for name, value in (("resolution", resolution), ("fraction", fraction)):
            if value <= 0:
                raise UserError(f"protocol.{name}={value}: expected more than 0")
        if not 0 < confidence < 1:
            raise UserError(f"protocol.confidence={confidence}: expected a number between 0 and 1")
        self.grid, self.d_min, self.d_max, self.ratio, self.resolution = grid, d_min, d_max, ratio, resolution
        self.seeds, self.ladder, self.fraction, self.global_baseline = (
            seeds,
            Ladder(lr_factors),
            fraction,
            global_baseline,
        )
        self.metric, self.select, self.confidence, self.bootstrap = metric, select, confidence, bootstrap
        self.warm = continuation == "warm"
        self.launcher, self.workers, self.slurm = launcher, workers, dict(slurm or {})
        self.cell = dict(cell or FIT)
        if "train/" in f"{metric} {select}" and "train_accuracy" in self.cell:
            self.cell["train_accuracy"] = True

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Search, using every finished cell of earlier searches of this name.

        Args:
            cfg: the validated configuration.
            run_dir: this search's folder; the cells lie beside it.
            label: not used: progress lines name the cell.
            resume_dir: the folder that `subspace-lab resume` would be given.

        Raises:
            UserError: a method that has no d, a d beyond D, a cell that cannot run.
            Interrupted: a signal asked to stop; finished cells are kept, running ones saved.
        """
        self._check(cfg)
        from subspace_lab.search import section
        from subspace_lab.training import environment

        factory = CellFactory(cfg, protocol=self.cell, resume_dir=resume_dir)
        slurm = for_submitit(cfg, self.slurm) if self.launcher == "slurm" else {}
        executor = executors.create(self.launcher, workers=self.workers, slurm=slurm, run_dir=run_dir)
        display = Display(self.metric, parallel=executor.parallel, silent=not environment.is_main_process())
        search = Search(self._plan(int(cfg.seed)), factory, executor, display)
        try:
            with display:
                search.run()
        except (Interrupted, KeyboardInterrupt):
            number = len(search.cells)
            raise Interrupted(
                f"interrupted with {number} cell{'s' if number != 1 else ''} finished, everything is saved; "
                f"continue with: subspace-lab resume {resume_dir}"
            ) from None
        finally:
            executor.close()
        found = section.of(search, confidence=self.confidence, resamples=self.bootstrap)
        return Outcome(
            metrics=section.metrics(found),
            timing={"cells": len(search.cells), "wall_seconds": found["cells"]["seconds"]},
            objective=f"{found['name']}/own",
            sections={"search": found},
        )

    def _plan(self, seed: int) -> Plan:
        return Plan(
            grid=self.grid,
            d_min=self.d_min,
            d_max=self.d_max,
            ratio=self.ratio,
            resolution=self.resolution,
            seeds=range(seed, seed + self.seeds),
            ladder=self.ladder,
            fraction=self.fraction,
            global_baseline=self.global_baseline,
            metric=self.metric,
            select=self.select,
            warm=self.warm,
        )

    def _check(self, cfg: DictConfig) -> None:
        if "d" not in cfg.method or "lr_factor" not in cfg.method:
            raise UserError(
                f"protocol=dimension_search varies method.d, which method={cfg.method.get('name')} does not have",
                hint="method=intrinsic_dimension, or protocol=fit",
            )
        if cfg.method.get("d") is not None:
            raise UserError(
                f"protocol=dimension_search chooses method.d itself, and it is set to {cfg.method.d}",
                hint=f"protocol=fit for one run, protocol.grid=[{cfg.method.d}] for a search of that d alone",
            )
        if cfg.get("compare") not in (None, "auto"):
            raise UserError(
                f"compare={cfg.compare} cannot be combined with protocol=dimension_search",
                hint="leave it out: a search trains its own baseline",
            )
        if self.launcher != "local" and (cfg.trainer.devices not in (1, "auto") or cfg.trainer.num_nodes != 1):
            raise UserError(
                f"protocol.launcher={self.launcher} runs cells of one process each",
                hint="trainer.devices=1, or protocol.launcher=local",
            )
