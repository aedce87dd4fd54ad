"""Which d and which learning rates a search tries, on exact curves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_lab.errors import UserError
from subspace_lab.search.grid import Geometric, bracket_of, default_d_max, next_points
from subspace_lab.search.learning_rates import Ladder


def search(
    answer: float, *, start: int, ahead: int = 1, d_max: int = 4096, resolution: float = 0.15
) -> dict[int, float]:
    """Try what `next_points` says until it says nothing; accuracy 1 above `answer`, 0 up to it."""
    fitted: dict[int, float] = {}
    grid = Geometric(1, d_max, 1.5)
    while wanted := next_points(fitted, [0.5], grid, start=start, resolution=resolution, ahead=ahead):
        assert not set(wanted) & set(fitted), "nothing is tried twice"
        fitted |= {d: float(d > answer) for d in wanted}
    return fitted


@given(st.integers(2, 4000), st.sampled_from([1, 8, 86, 1000, 4096]), st.integers(1, 4))
def test_brackets_any_answer_to_the_resolution(answer: int, near: int, ahead: int) -> None:
    start = Geometric(1, 4096, 1.5).nearest(near)
    fitted = search(answer, start=start, ahead=ahead)
    low, high = bracket_of(fitted, 0.5) or (0, 0)
    assert low <= answer < high
    assert high <= low * 1.15 or high - low <= 1
    assert len(fitted) <= (13 if ahead == 1 else 17)


def test_out_of_reach_ends_at_d_max() -> None:
    fitted = search(10_000, start=86)
    assert max(fitted) == 4096 and not any(fitted.values()) and len(fitted) < 7


def test_all_pass_ends_at_d_min() -> None:
    assert min(search(0, start=86)) == 1


def test_two_thresholds_are_both_bracketed() -> None:
    fitted: dict[int, float] = {}
    grid = Geometric(1, 4096, 1.5)
    while wanted := next_points(fitted, [100, 900], grid, start=195, resolution=0.1, ahead=1):
        fitted |= {d: float(d) for d in wanted}
    for threshold in (100, 900):
        low, high = bracket_of(fitted, threshold) or (0, 0)
        assert low <= threshold < high <= low * 1.1


def test_geometric_points() -> None:
    assert Geometric(10, 60, 1.5).points() == [10, 15, 22, 34, 51, 60]
    assert Geometric(7, 7, 1.5).points() == [7]
    assert Geometric(1, 10**6, 1.5).nearest(17_610 / 200) == 86


@pytest.mark.parametrize(
    ("parameters", "grid", "expected"),
    [
        (17_610, None, 4096),
        (17_610, [50, 200], 4096),
        (17_610, [9000], 16_384),
        (17_610, [17_000], 17_610),
        (6, None, 1),
    ],
)
def test_default_d_max(parameters: int, grid: list[int] | None, expected: int) -> None:
    assert default_d_max(parameters, grid) == expected
    assert default_d_max(10**9, None) == 2**17


def test_ladder_rungs_are_the_same_numbers_from_anywhere() -> None:
    ladder = Ladder([0.333333, 1.0, 3.0])
    assert [ladder.factor(rung) for rung in range(-2, 5)] == [0.03704, 0.1111, 0.3333, 1.0, 3.0, 9.0, 27.0]
    assert ladder.scan(ladder.middle) == [0, 1, 2] and ladder.scan(3) == [2, 3, 4]


def test_scan_goes_once_beyond_an_edge() -> None:
    ladder = Ladder([1 / 3, 1, 3])
    assert ladder.beyond({0: 0.1, 1: 0.2, 2: 0.3}) == 3
    assert ladder.beyond({0: 0.3, 1: 0.2, 2: 0.1}) == -1
    assert ladder.beyond({0: 0.1, 1: 0.3, 2: 0.1}) is None
    assert ladder.best({0: 0.3, 1: 0.3, 2: 0.3}) == 1, "of equals the one in the middle"
    assert Ladder([1.0]).beyond({0: 0.5}) is None, "one factor is no scan"


@pytest.mark.parametrize("factors", [[], [0.0, 1.0], [1.0, 1.0], [-1.0]])
def test_factors_that_make_no_ladder(factors: list[float]) -> None:
    with pytest.raises(UserError, match="lr_factors"):
        Ladder(factors)
