"""Initial frequencies for the arithmetic coder from one byte: a discretised bell, computed in integers.

The decoder has to arrive at the very same integers on every machine, so no library's exponential takes part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from subspace_lab.compression.arithmetic import Frequencies

Shape = Literal["flat", "gaussian", "laplace"]
SHAPES: tuple[Shape, ...] = ("flat", "gaussian", "laplace")

_ONE = 1 << 60
_LN2 = 799144290325165979  # ln 2 · 2^60, rounded
_TOTAL = 1 << 16
#: a bell is believed as much as this many symbols seen
_BELIEF = 512


def create(shape: Shape, width: int, levels: int) -> Frequencies:
    """Return the frequencies of `levels` equally spaced levels around 0.

    Args:
        shape: flat learns everything from the symbols; gaussian and laplace start from a bell.
        width: 0 … 255; the bell's standard deviation (laplace: mean absolute value) in levels is 2^(width/16 − 3).
        levels: number of symbols, at most 2^14.
    """
    if shape == "flat":
        return Frequencies([1] * levels, increment=2)  # starts at half a count each: Krichevsky & Trofimov's estimator
    return Frequencies(table(shape, width, levels), increment=_TOTAL // _BELIEF)


@lru_cache(maxsize=1024)
def table(shape: Shape, width: int, levels: int) -> tuple[int, ...]:
    """Return positive frequencies that add up to about 2^16, symmetric around the middle level."""
    narrow = _exp(width * _LN2 // 16)  # 2^(−width/16) in Q60
    weights = []
    for index in range(levels):
        twice = abs(2 * index - (levels - 1))  # distance from the middle in half levels
        scaled = (twice * narrow * 4) >> 20  # distance / σ, in Q40: σ = 2^(width/16) / 8
        weights.append(_exp((scaled * scaled) >> 21 if shape == "gaussian" else scaled << 20))
    total = sum(weights)
    spare = max(_TOTAL - levels, levels)
    return tuple(1 + weight * spare // total for weight in weights)


def code_lengths(shape: Shape, width: int, levels: int) -> npt.NDArray[np.float64]:
    """Return what each symbol costs in bits before anything is learnt, (levels,)."""
    counts = np.array(table(shape, width, levels), dtype=np.float64)
    return np.asarray(np.log2(counts.sum() / counts))


def _exp(x: int) -> int:
    """Return e^−x for x ≥ 0, both as multiples of 2^−60."""
    if x > 64 * _ONE:
        return 0
    small = x >> 8  # at most 1/4
    term = total = _ONE
    for n in range(1, 24):
        term = -((term * small) >> 60) // n
        total += term
    for _ in range(8):
        total = (total * total) >> 60
    return max(total, 0)
