"""Which d to try: a geometric grid, galloping until every threshold is bracketed, then bisection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from subspace_lab.search.statistics import exceeds

# Where the search begins without a better guess: published intrinsic dimensions scatter around D/200 (MNIST 1/266 and
# 1/153, CIFAR-10 1/73 and 1/21, reinforcement learning far less).
START = 200
# The largest d that is tried unless told: D/8, within which the blocks of the projections stay small. Not more than so
# many numbers, which solve anything published.
SHARE, MOST = 8, 2**17


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def default_d_max(parameters: int, grid: Sequence[int] | None) -> int:
    """Return the largest d of a search, which also fixes the projection that all its subspaces are cut from.

    One rule with and without a grid, so that both share their runs: the power of two from D/8 on, not above 2¹⁷, more
    if the grid asks for it, and never more than D.

    Args:
        parameters: D.
        grid: the d that must be possible.
    """
    usual = min(next_power_of_two(math.ceil(parameters / SHARE)), MOST)
    return min(max(usual, next_power_of_two(max(grid or [1]))), parameters)


@dataclass(frozen=True)
class Geometric:
    """The points round(d_min · ratioᵏ) up to and including d_max.

    Args:
        d_min: the first.
        d_max: the last.
        ratio: of neighbours, above 1.
    """

    d_min: int
    d_max: int
    ratio: float

    def points(self) -> list[int]:
        """Return all points, ascending, each once."""
        steps = math.ceil(math.log(self.d_max / self.d_min) / math.log(self.ratio)) if self.d_max > self.d_min else 0
        found = {min(round(self.d_min * self.ratio**k), self.d_max) for k in range(steps + 1)}
        return sorted(found | {self.d_max})

    def nearest(self, d: float) -> int:
        """Return the point with the least ratio to `d`."""
        return min(self.points(), key=lambda point: abs(math.log(point / max(d, 1e-9))))


def next_points(
    fitted: Mapping[int, float],
    thresholds: Sequence[float],
    grid: Geometric,
    *,
    start: int,
    resolution: float,
    ahead: int,
) -> list[int]:
    """Return the d to try next; none: every threshold is bracketed closely enough, or out of reach.

    First `start`; then away from it over the grid with steps that double (1, 2, 4 … points), upward while a threshold
    is not exceeded anywhere, downward while one is exceeded everywhere; then the geometric mean of every bracket wider
    than `resolution`.

    Args:
        fitted: d -> non-decreasing accuracy of what was tried.
        thresholds: accuracies to exceed.
        grid: where galloping goes.
        start: where it begins.
        resolution: a bracket (low, high] with high/low ≤ 1 + resolution is close enough.
        ahead: points to try at the same time while galloping.
    """
    if not fitted:
        return _gallop(grid.points(), start, start, +1, ahead)
    tried = sorted(fitted)
    if any(not exceeds(fitted[tried[-1]], threshold) for threshold in thresholds) and tried[-1] < grid.d_max:
        return _gallop(grid.points(), start, tried[-1] + 1, +1, ahead)
    if any(exceeds(fitted[tried[0]], threshold) for threshold in thresholds) and tried[0] > grid.d_min:
        return _gallop(grid.points(), start, tried[0] - 1, -1, ahead)
    middles = set()
    for threshold in thresholds:
        bracket = bracket_of(fitted, threshold)
        if bracket is not None and bracket[1] > bracket[0] * (1 + resolution):
            middle = round(math.sqrt(bracket[0] * bracket[1]))
            if bracket[0] < middle < bracket[1]:
                middles.add(middle)
    return sorted(middles)


def bracket_of(fitted: Mapping[int, float], threshold: float) -> tuple[int, int] | None:
    """Return the neighbours (low, high) between which the fit passes the threshold; None: it does not."""
    tried = sorted(fitted)
    above = next((i for i, d in enumerate(tried) if exceeds(fitted[d], threshold)), 0)
    return (tried[above - 1], tried[above]) if above else None


def points_left(fitted: Mapping[int, float], thresholds: Sequence[float], resolution: float) -> int:
    """Return about how many more points a search will try: exact for bisection, a guess while galloping."""
    left = 0.0
    for threshold in thresholds:
        low, high = bracket_of(fitted, threshold) or (1, 3)
        left += max(0.0, math.log2(max(math.log(high / low) / math.log1p(resolution), 1)))
    return math.ceil(left / max(1, len(thresholds)) * (1 + 0.5 * (len(thresholds) - 1)))


def _gallop(points: Sequence[int], start: int, first: int, direction: int, ahead: int) -> list[int]:
    """The next stops at or beyond `first`: 0, 1, 3, 7 … grid points away from the start, the last point at the end."""
    begin = points.index(start)
    found: list[int] = []
    step = 0
    while len(found) < ahead:
        index = begin + direction * (2**step - 1)
        step += 1
        clipped = min(max(index, 0), len(points) - 1)
        if (points[clipped] - first) * direction >= 0 and points[clipped] not in found:
            found.append(points[clipped])
        if clipped != index or step > len(points):
            break
    return found
