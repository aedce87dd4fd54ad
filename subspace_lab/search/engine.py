"""The search itself: baseline, then point after point of the curve until the thresholds are bracketed.

Everything it does is decided by figures of cells, and a cell's figures do not change: a search that starts again asks
for the same cells in the same order and finds the finished ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from subspace_lab.errors import UserError
from subspace_lab.search import grid as grids
from subspace_lab.search import statistics
from subspace_lab.search.cells import CellFactory, CellResult, CellSpec, read_result
from subspace_lab.search.executors import Executor
from subspace_lab.search.learning_rates import Ladder
from subspace_lab.search.progress import Display


@dataclass(frozen=True)
class Plan:
    """What to search; see `protocols.dimension_search.DimensionSearch` for the meaning of each."""

    grid: Sequence[int] | None
    d_min: int
    d_max: int | None
    ratio: float
    resolution: float
    seeds: Sequence[int]
    ladder: Ladder
    fraction: float
    global_baseline: float | None
    metric: str
    select: str
    warm: bool


@dataclass
class Point:
    """All cells at one d (None: the baseline).

    Attributes:
        d: trained numbers.
        scan: rung -> cell of the first seed.
        rung: the chosen one, by the selection metric.
        runs: seed -> cell with the chosen factor.
    """

    d: int | None
    scan: dict[int, CellResult] = field(default_factory=dict)
    rung: int = 0
    runs: dict[int, CellResult] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """Return one figure of all seeds, in their order."""
        return [self.runs[seed].value(metric) for seed in sorted(self.runs)]


class Search:
    """Runs the cells that a plan asks for.

    Args:
        plan: what to search.
        factory: makes the cells.
        executor: runs them.
        display: tells of them.

    Attributes:
        baseline: the full space's point, once trained.
        points: d -> point, of everything tried.
        parameters: D.
        d_max: the largest d.
        cells: key -> result of every cell used.
    """

    def __init__(self, plan: Plan, factory: CellFactory, executor: Executor, display: Display) -> None:
        self.plan, self.factory, self.executor, self.display = plan, factory, executor, display
        self.baseline = Point(None)
        self.points: dict[int, Point] = {}
        self.cells: dict[str, CellResult] = {}
        self.parameters = 0
        self.d_max = 0

    def run(self) -> None:
        """Search until nothing is left to try.

        Raises:
            UserError: a grid beyond D, a figure that runs do not have, a cell that cannot run.
            Interrupted: a signal asked to stop.
        """
        plan = self.plan
        self._train([self.baseline])
        self.parameters = int(self.baseline.scan[self.baseline.rung].value("model/parameters"))
        self._settle_d_max()
        self.display.thresholds = self.thresholds()
        if plan.grid is not None:
            wanted = sorted(set(plan.grid))
            for batch in [[d] for d in wanted] if plan.warm else [wanted]:
                self._train([self._new_point(d) for d in batch])
        else:
            self._gallop_and_bisect()
        # With method.targets the subspace is one of fewer weights than the model has.
        sizes = [cell.metrics.get("subspace/D") for point in self.points.values() for cell in point.runs.values()]
        self.parameters = int(sizes[0] or self.parameters)

    def curve(self) -> dict[int, list[float]]:
        """Return d -> accuracies of the seeds."""
        return {d: self.points[d].values(self.plan.metric) for d in sorted(self.points) if self.points[d].runs}

    def thresholds(self) -> dict[str, float]:
        """Return name of the definition -> accuracy to exceed."""
        plan = self.plan
        own = plan.fraction * statistics.mean(self.baseline.values(plan.metric))
        return ({} if plan.global_baseline is None else {"global": plan.fraction * plan.global_baseline}) | {"own": own}

    def _gallop_and_bisect(self) -> None:
        plan = self.plan
        grid = grids.Geometric(plan.d_min, self.d_max, plan.ratio)
        start = grid.nearest(self.parameters / grids.START)
        # Cells beyond one point's scan can only be used by other points.
        ahead = 1 if plan.warm else max(1, self.executor.parallel // len(plan.ladder.scan(0)))
        while wanted := grids.next_points(
            statistics.fit(self.curve()),
            list(self.thresholds().values()),
            grid,
            start=start,
            resolution=plan.resolution,
            ahead=ahead,
        ):
            for batch in [[d] for d in wanted] if plan.warm else [wanted]:
                self._train([self._new_point(d) for d in batch])

    def _settle_d_max(self) -> None:
        plan, parameters = self.plan, self.parameters
        largest = max([*(plan.grid or []), plan.d_min])
        if largest > parameters:
            raise UserError(f"d={largest} is more than the D={parameters} weights of the model")
        usual = grids.default_d_max(parameters, [largest])
        self.d_max = min(plan.d_max or usual, parameters)
        self.factory.d_max = self.d_max

    def _new_point(self, d: int) -> Point:
        self.points[d] = Point(d)
        return self.points[d]

    def _train(self, points: Sequence[Point]) -> None:
        """Scan learning rates at the first seed, go beyond an edge that is the best, then train the other seeds."""
        plan = self.plan
        first, *others = plan.seeds
        self._scan([(point, rung) for point in points for rung in plan.ladder.scan(self._centre(point.d))])
        further = [(point, plan.ladder.beyond(self._scores(point))) for point in points]
        self._scan([(point, rung) for point, rung in further if rung is not None])
        for point in points:
            point.rung = plan.ladder.best(self._scores(point))
            point.runs[first] = point.scan[point.rung]
        rest = [(point, seed) for point in points for seed in others]
        specs = [self._spec(point.d, seed, point.rung) for point, seed in rest]
        for (point, seed), result in zip(rest, self._evaluate(specs), strict=True):
            point.runs[seed] = result

    def _scan(self, wanted: Sequence[tuple[Point, int]]) -> None:
        specs = [self._spec(point.d, self.plan.seeds[0], rung) for point, rung in wanted]
        for (point, rung), result in zip(wanted, self._evaluate(specs), strict=True):
            point.scan[rung] = result

    def _scores(self, point: Point) -> dict[int, float]:
        """Return rung -> validation figure; a run that diverged is never chosen before one that did not."""
        return {rung: -math.inf if cell.diverged else cell.value(self.plan.select) for rung, cell in point.scan.items()}

    def _centre(self, d: int | None) -> int:
        """Return the best rung of the nearest d that was tried: the rule lr ∝ sqrt(D/d) leaves little to find anew."""
        known = [point for point in self.points.values() if point.d is not None and point.runs]
        if d is None or not known:
            return self.plan.ladder.middle
        return min(known, key=lambda point: (abs(math.log((point.d or 1) / d)), point.d)).rung

    def _spec(self, d: int | None, seed: int, rung: int) -> CellSpec:
        kind: Literal["baseline", "subspace"] = "baseline" if d is None else "subspace"
        return CellSpec(kind, seed, self.plan.ladder.factor(rung), d, self._parent(d, seed))

    def _parent(self, d: int | None, seed: int) -> str | None:
        """Return the cell whose solution a warm cell starts from: the same seed's at the next smaller d."""
        if d is None or not self.plan.warm:
            return None
        smaller = [other for other, point in self.points.items() if other < d and seed in point.runs]
        return self.points[max(smaller)].runs[seed].key if smaller else None

    def _evaluate(self, specs: Sequence[CellSpec]) -> list[CellResult]:
        """Return the results of cells in their order; those on the disk are read, the others trained."""
        tasks = [self.factory.task(spec) for spec in specs]
        results = {task.key: found for task in tasks if (found := self.cells.get(task.key) or read_result(task))}
        for key, result in results.items():
            if key not in self.cells:
                self.cells[key] = result
                self.display.finished(result, 0)
        missing = {task.key: task for task in tasks if task.key not in results}
        for result in self.executor.run(list(missing.values())) if missing else ():
            results[result.key] = self.cells[result.key] = result
            missing.pop(result.key)
            self.display.finished(result, self._left(len(missing)))
        return [results[task.key] for task in tasks]

    def _left(self, in_batch: int) -> int:
        """Return about how many cells are still to be trained."""
        plan = self.plan
        per_point = len(plan.ladder.scan(0)) + len(plan.seeds) - 1
        opened = sum(len(plan.seeds) - 1 for point in [self.baseline, *self.points.values()] if not point.runs)
        if plan.grid is not None:
            points = len(set(plan.grid) - set(self.points))
        else:
            fitted = statistics.fit(self.curve()) if self.points else {}
            limits = list(self.thresholds().values()) if self.baseline.runs else [math.inf]
            points = grids.points_left(fitted, limits, plan.resolution)
        return in_batch + opened + points * per_point
