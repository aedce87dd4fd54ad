"""Reading an intrinsic dimension off synthetic curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from subspace_lab.search.statistics import Dimension, crossing, dimensions, exceeds, fit, isotonic, paper_rule

DS = [10, 22, 50, 75, 110, 170, 250, 380]


def saturating(d: float, *, top: float = 0.98, scale: float = 55.0) -> float:
    return top * (1 - math.exp(-d / scale))


def measure(
    curve: dict[int, list[float]], baseline: list[float] | None = None, **named: object
) -> dict[str, Dimension]:
    settings = {"fraction": 0.9, "global_baseline": 1.0, "confidence": 0.9, "resamples": 300, "seed": 0, **named}
    return dimensions(curve, baseline or [0.98, 0.98, 0.98], **settings)  # type: ignore[arg-type]


def test_isotonic_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        values, weights = rng.normal(size=size), rng.integers(1, 5, size=size)
        expected = IsotonicRegression().fit(np.arange(size), values, sample_weight=weights).predict(np.arange(size))
        np.testing.assert_allclose(isotonic(values, weights), expected, atol=1e-12)


def test_known_crossing_without_noise() -> None:
    found = measure({d: [saturating(d)] * 3 for d in DS})
    exact = {name: -55 * math.log(1 - threshold / 0.98) for name, threshold in (("global", 0.9), ("own", 0.882))}
    for name, dimension in found.items():
        low, high = max(d for d in DS if d < exact[name]), min(d for d in DS if d > exact[name])
        assert dimension.crossing.grid == dimension.paper_rule == high
        assert low < dimension.crossing.interpolated < high
        assert dimension.grid_interval == (high, high), "equal seeds: nothing to resample"
    assert found["own"].threshold == pytest.approx(0.882) and found["global"].threshold == pytest.approx(0.9)


def test_interpolation_is_linear_in_log_d() -> None:
    at = crossing([10, 1000], [0.0, 1.0], 0.5)
    assert at.interpolated == pytest.approx(100) and at.grid == 1000


def test_noise_that_goes_down_again_is_smoothed() -> None:
    curve = {100: [0.85], 150: [0.905], 200: [0.87], 250: [0.93]}
    assert paper_rule(curve, 0.9) == 150, "the literal rule takes the first lucky point"
    found = measure(curve, [1.0], global_baseline=None)["own"]
    assert found.crossing.grid == 250
    assert 200 < found.crossing.interpolated < 250
    assert fit(curve) == pytest.approx({100: 0.85, 150: 0.8875, 200: 0.8875, 250: 0.93})


def test_more_seeds_weigh_more() -> None:
    assert fit({1: [0.9], 2: [0.6, 0.6, 0.6]})[1] == pytest.approx((0.9 + 3 * 0.6) / 4)


def test_unreached() -> None:
    found = measure({d: [saturating(d, top=0.5)] * 3 for d in DS})["own"]
    assert found.crossing.grid == found.crossing.interpolated == math.inf and not found.crossing.below
    assert found.grid_interval == (math.inf, math.inf) and found.paper_rule is None


def test_every_point_passes() -> None:
    found = measure({d: [0.97, 0.96, 0.98] for d in DS})["own"]
    assert found.crossing.below and found.crossing.grid == DS[0] == found.paper_rule
    assert found.grid_interval == (-math.inf, -math.inf)
    assert not crossing([1, 2], [0.95, 0.96], 0.9).below, "below one dimension there is nothing: 1 is the answer"


def test_equality_with_the_threshold_fails() -> None:
    curve = {10: [0.2] * 3, 20: [0.9] * 3, 40: [0.9000001] * 3}
    found = measure(curve)["global"]
    assert found.crossing.grid == found.paper_rule == 40
    # Three times 0.3 and one times 0.9 are the same number for us, whatever their last bits say.
    assert not exceeds(0.3 + 0.3 + 0.3, 0.9) and not exceeds(0.9, 0.3 + 0.3 + 0.3)


def test_interval_covers_and_grows_with_the_noise() -> None:
    rng = np.random.default_rng(3)

    def interval(noise: float) -> tuple[float, float]:
        curve = {d: (saturating(d) + noise * rng.normal(size=5)).tolist() for d in range(90, 190, 5)}
        return measure(curve, (0.98 + noise * rng.normal(size=5)).tolist())["own"].interpolated_interval

    exact = -55 * math.log(0.1)
    widths = []
    for noise in (0.002, 0.01):
        low, high = interval(noise)
        assert low <= exact * 1.06 and high >= exact * 0.94
        widths.append(high - low)
    assert widths[0] < widths[1]


def test_own_threshold_moves_with_the_baseline() -> None:
    curve = {d: [saturating(d)] * 3 for d in range(60, 300, 4)}
    steady = measure(curve, [0.9] * 3)
    shaky = measure(curve, [0.85, 0.9, 0.95])
    assert steady["own"].grid_interval[0] == steady["own"].grid_interval[1]
    assert shaky["own"].grid_interval[0] < shaky["own"].crossing.grid < shaky["own"].grid_interval[1]
    assert shaky["global"].grid_interval == steady["global"].grid_interval


def test_the_same_seed_gives_the_same_interval() -> None:
    curve = {d: [saturating(d), saturating(d) + 0.03, saturating(d) - 0.02] for d in DS}
    assert measure(curve) == measure(curve)
