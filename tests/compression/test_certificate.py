"""The bound: golden values by another route, monotonicity, and the reference table's figure."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_lab.compression.certificate import certify, description_bits, kl, kl_inverse


def scan(q: float, budget: float) -> float:
    """The inverse by brute force: ever finer steps upwards while the relative entropy stays within the budget."""

    def entropy(p: float) -> float:
        cross = -q * math.log2(p) - (1 - q) * math.log2(1 - p)
        own = sum(-x * math.log2(x) for x in (q, 1 - q) if x)
        return (cross - own) * math.log(2)

    p, width = max(q, 1e-15), 0.1
    while width > 1e-13:
        while p + width < 1 and entropy(p + width) <= budget:
            p += width
        width /= 10
    return p


@pytest.mark.parametrize("q", [0.0, 1e-4, 0.0926, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("budget", [1e-5, 0.01, 0.049, 0.5, 3.0])
def test_inverse_against_a_scan(q: float, budget: float) -> None:
    assert kl_inverse(q, budget) == pytest.approx(scan(q, budget), abs=1e-10)


def test_closed_forms() -> None:
    assert kl_inverse(0.0, 0.05) == pytest.approx(1 - math.exp(-0.05), abs=1e-12)  # kl(0 ‖ p) = −ln(1 − p)
    assert kl_inverse(1.0, 0.05) == 1.0
    assert kl_inverse(0.25, 0.0) == pytest.approx(0.25, abs=1e-8)  # kl is flat at its minimum: rounding
    assert kl(0.5, 0.25) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert kl(0.1, 0.0) == math.inf and kl(0.1, 1.0) == math.inf and kl(0.0, 0.0) == 0.0


@given(st.floats(0, 0.99), st.floats(0, 2), st.floats(0, 2))
def test_inverse_is_an_upper_bound_and_grows(q: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert q <= kl_inverse(q, low) <= kl_inverse(q, high) + 1e-12
    p = kl_inverse(q, low)
    assert p == 1.0 or kl(q, p) >= low - 1e-9
    assert kl_inverse(q, low) <= q + math.sqrt(low / 2) + 1e-7  # Pinsker: never worse than Hoeffding's form


def test_more_bytes_errors_choices_or_confidence_cost_more() -> None:
    base = certify(5500, 60000, 400).bound
    assert certify(5500, 60000, 401).bound > base
    assert certify(5501, 60000, 400).bound > base
    assert certify(5500, 60000, 400, choices=2).bound > base
    assert certify(5500, 60000, 400, delta=0.01).bound > base
    assert certify(5500 * 2, 120000, 400).bound < base


def test_descriptions_form_a_prefix_free_code() -> None:
    """Kraft: Σ over lengths of 256^bytes · 2^−bits ≤ 1, and what is chosen among k shares it."""
    assert sum(Fraction(256**n, 2 ** description_bits(n)) for n in range(1, 300)) <= 1
    for k in (1, 2, 3, 7, 8, 9):
        assert description_bits(100, k) - description_bits(100) == math.ceil(math.log2(k))
    assert description_bits(477) == 8 * 477 + 17


def test_the_reference_table() -> None:
    """d = 750 in 477 bytes: bound .206 at test accuracy .9074; its training error (not given) was near."""
    for n, train_error in ((60000, 0.0953), (55000, 0.0910), (54000, 0.0902)):
        assert certify(round(train_error * n), n, 477).bound == pytest.approx(0.206, abs=5e-4)
    for size, error, bound in ((998, 0.0905, 0.262), (601, 0.0920, 0.218), (376, 0.1085, 0.208), (198, 0.285, 0.370)):
        assert certify(round(error * 60000), 60000, size).bound == pytest.approx(bound, abs=0.008)


@pytest.mark.parametrize("wrong", [{"n": 7}, {"errors": -1}, {"errors": 101}, {"payload": 0}, {"choices": 0}])
def test_impossible_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        certify(**({"errors": 1, "n": 100, "payload": 10} | wrong))
    with pytest.raises(ValueError):
        certify(1, 100, 10, delta=1.0)
