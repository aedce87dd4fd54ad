"""From accuracies at some d to an intrinsic dimension with an interval.

The curve of mean accuracies over d is fitted by the closest non-decreasing one (isotonic regression), because a larger
subspace contains every smaller one and can only do better; what the means do beside that is noise of the seeds. The
interval is the percentile bootstrap over seeds: at every d and of the baseline, seeds are drawn anew with replacement.
With three seeds that is rough (27 different resamples per point), but it is the scale on which seeds move the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Means of equal numbers may differ in the last bit: so much more than the threshold does not count as more.
TIE = 1e-9

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Crossing:
    """Where a non-decreasing curve passes a threshold.

    Attributes:
        grid: the smallest d tried whose fitted value is greater than the threshold; inf: none is.
        interpolated: where the line through the fit over log d meets the threshold; inf: nowhere; the smallest d tried
            if the curve is above it there already.
        below: the smallest d tried is above the threshold already, so that both values are only upper bounds.
    """

    grid: float
    interpolated: float
    below: bool


@dataclass(frozen=True)
class Dimension:
    """An intrinsic dimension by one definition.

    Attributes:
        threshold: the accuracy to be exceeded.
        crossing: of the fit to all seeds.
        grid_interval: lower and upper bound of `crossing.grid`; inf means above every d tried, -inf below.
        interpolated_interval: the same of `crossing.interpolated`.
        paper_rule: the first d tried whose plain mean is greater than the threshold, without a fit; None: none is.
    """

    threshold: float
    crossing: Crossing
    grid_interval: tuple[float, float]
    interpolated_interval: tuple[float, float]
    paper_rule: int | None


def exceeds(value: float, threshold: float) -> bool:
    """Return whether a mean is greater than the threshold: equality fails, as in the paper."""
    return value - threshold > TIE


def mean(values: Sequence[float]) -> float:
    """Return the correctly rounded mean."""
    return math.fsum(values) / len(values)


def isotonic(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> Array:
    """Return the non-decreasing sequence with the least weighted squared distance (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] >= block[0]:
            left = blocks.pop()
            total = left[1] + block[1]
            block = ((left[0] * left[1] + block[0] * block[1]) / total, total, left[2] + block[2])
        blocks.append(block)
    return np.repeat([b[0] for b in blocks], [b[2] for b in blocks])


def fit(curve: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Return d -> isotonic fit to the means, in ascending d.

    Args:
        curve: d -> accuracies, one per seed; weights are their numbers.
    """
    ds = sorted(curve)
    fitted = isotonic([mean(curve[d]) for d in ds], [len(curve[d]) for d in ds])
    return dict(zip(ds, fitted.tolist(), strict=True))


def crossing(ds: Sequence[int], fitted: Sequence[float] | Array, threshold: float) -> Crossing:
    """Return where a non-decreasing curve passes a threshold; `ds` ascends."""
    above = next((i for i, value in enumerate(fitted) if exceeds(value, threshold)), None)
    if above is None:
        return Crossing(math.inf, math.inf, False)
    if above == 0:
        # Nothing is smaller than one dimension: there the value is the answer and no bound.
        return Crossing(float(ds[0]), float(ds[0]), ds[0] > 1)
    d0, d1, y0, y1 = ds[above - 1], ds[above], float(fitted[above - 1]), float(fitted[above])
    share = (threshold - y0) / (y1 - y0)
    return Crossing(float(d1), d0 * (d1 / d0) ** min(max(share, 0.0), 1.0), False)


def paper_rule(curve: Mapping[int, Sequence[float]], threshold: float) -> int | None:
    """Return the first d whose mean is greater than the threshold, as Li et al. read it off; None if none is."""
    return next((d for d in sorted(curve) if exceeds(mean(curve[d]), threshold)), None)


def dimensions(
    curve: Mapping[int, Sequence[float]],
    baseline: Sequence[float],
    *,
    fraction: float,
    global_baseline: float | None,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Dimension]:
    """Return the intrinsic dimension by each definition, `global` (if there is such a baseline) and `own`.

    Args:
        curve: d -> accuracies, one per seed.
        baseline: accuracies of the full space, one per seed.
        fraction: of the baseline that counts as solved, 0.9 for d_int90.
        global_baseline: the accuracy that counts as 1 for every model, or None.
        confidence: of the interval, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    ds = sorted(curve)
    thresholds = {"own": fraction * mean(baseline)}
    if global_baseline is not None:
        thresholds = {"global": fraction * global_baseline, **thresholds}
    fitted = fit(curve)
    found = {name: crossing(ds, list(fitted.values()), value) for name, value in thresholds.items()}
    samples = _bootstrap(ds, curve, baseline, thresholds, fraction, resamples, seed)
    return {
        name: Dimension(
            threshold=value,
            crossing=found[name],
            grid_interval=_interval(samples[name][:, 0], confidence),
            interpolated_interval=_interval(samples[name][:, 1], confidence),
            paper_rule=paper_rule(curve, value),
        )
        for name, value in thresholds.items()
    }


def _bootstrap(
    ds: Sequence[int],
    curve: Mapping[int, Sequence[float]],
    baseline: Sequence[float],
    thresholds: Mapping[str, float],
    fraction: float,
    resamples: int,
    seed: int,
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    means = np.stack([_resampled_means(curve[d], resamples, rng) for d in ds], axis=1)  # (resamples, points)
    own = fraction * _resampled_means(baseline, resamples, rng)
    weights = [len(curve[d]) for d in ds]
    samples = {name: np.empty((resamples, 2)) for name in thresholds}
    for index, row in enumerate(means):
        fitted = isotonic(row, weights)
        for name, value in thresholds.items():
            # The own threshold moves with the baseline's seeds, the global one is a constant.
            at = crossing(ds, fitted, float(own[index]) if name == "own" else value)
            samples[name][index] = (-math.inf, -math.inf) if at.below else (at.grid, at.interpolated)
    return samples


def _resampled_means(values: Sequence[float], resamples: int, rng: np.random.Generator) -> Array:
    array = np.asarray(values, dtype=np.float64)
    drawn: Array = array[rng.integers(len(array), size=(resamples, len(array)))].mean(axis=1)
    return drawn


def _interval(samples: Array, confidence: float) -> tuple[float, float]:
    # Whole order statistics: between infinities nothing can be interpolated.
    tail = (1 - confidence) / 2
    ordered = np.sort(samples)
    last = len(ordered) - 1
    return float(ordered[math.floor(tail * last)]), float(ordered[math.ceil((1 - tail) * last)])
