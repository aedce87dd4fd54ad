"""From real numbers to few levels: a uniform grid or a codebook, chosen for its error and its bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from subspace_lab.compression import frequencies

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
MAX_LEVELS = 4096  # 12 bits: nothing is lost beyond, and the coder's frequencies still resolve them


@dataclass(frozen=True)
class Levels:
    """The values that coded numbers take.

    Attributes:
        count: how many.
        step: their distance; a bfloat16 number, so that it takes two bytes.
        codebook: values in units of `step`, ascending float16 numbers, (count,); None is the grid that is symmetric
            around 0: −(count−1)/2 … (count−1)/2 (0 is among its values for an odd count).
    """

    count: int
    step: float
    codebook: tuple[float, ...] | None = None

    def values(self) -> npt.NDArray[np.float32]:
        """Return the values, float32 (count,): one rounding each, the same everywhere."""
        if self.codebook is not None:
            return np.float32(self.step) * np.array(self.codebook, dtype=np.float32)
        return np.float32(self.step) * (np.arange(self.count, dtype=np.float32) - np.float32((self.count - 1) / 2))

    def nearest(self, z: Array) -> Indices:
        """Return the index of the value nearest to each number, int64 (d,)."""
        if self.codebook is not None:
            values = self.values().astype(np.float64)
            return np.searchsorted((values[1:] + values[:-1]) / 2, z).astype(np.int64)
        middle = (self.count - 1) / 2
        return np.clip(np.rint(z / self.step + middle), 0, self.count - 1).astype(np.int64)


@dataclass(frozen=True)
class Quantized:
    """Numbers as indices into levels, with the model that codes them.

    Attributes:
        levels: the values.
        indices: int64 (d,).
        shape: the frequency model; see `frequencies.create`.
        width: its width byte.
    """

    levels: Levels
    indices: Indices
    shape: frequencies.Shape = "gaussian"
    width: int = 0

    def values(self) -> npt.NDArray[np.float32]:
        """Return the numbers that these stand for, float32 (d,)."""
        return np.asarray(self.levels.values()[self.indices])


def round_bfloat16(value: float) -> float:
    """Return the bfloat16 number nearest to a positive finite one (at least the smallest normal number)."""
    bits = int(np.array(max(value, 2.0**-126), dtype=np.float32).view(np.uint32))
    rounded = min((bits + 0x8000) >> 16, 0x7F7F)
    return float(np.array(rounded << 16, dtype=np.uint32).view(np.float32))


def full_range(z: Array, count: int) -> Quantized:
    """Quantise to `count` equally spaced levels from −max|z| to max|z|.

    With an entropy code the rare outer levels cost little, and this is the best grid until there are few levels.
    """
    return on_grid(z, Levels(count, round_bfloat16(2 * _largest(z) / (count - 1))))


def clipped(z: Array, count: int) -> Quantized:
    """Quantise to the `count` equally spaced levels of least squared error; outliers are clipped to the last one."""
    widest = 2 * _largest(z) / (count - 1)
    steps = sorted({round_bfloat16(widest * 2 ** (-k / 16)) for k in range(33)})  # down to a quarter of the range
    best = min((Levels(count, step) for step in steps), key=lambda grid: _squared_error(z, grid))
    return on_grid(z, best)


def on_grid(z: Array, levels: Levels) -> Quantized:
    """Quantise to the nearest of given levels."""
    return with_best_model(levels, levels.nearest(z))


def kmeans(z: Array, count: int, rounds: int = 100) -> Quantized:
    """Quantise to a codebook of `count` values by Lloyd's iteration from equally filled cells."""
    values = np.unique(np.quantile(z, (np.arange(count) + 0.5) / count))
    for _ in range(rounds):
        cells = np.searchsorted((values[1:] + values[:-1]) / 2, z)
        sizes = np.bincount(cells, minlength=len(values))
        sums = np.bincount(cells, weights=z, minlength=len(values))
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), values)
        if np.allclose(moved, values, rtol=1e-9, atol=0):
            break
        values = np.sort(moved)
    step = round_bfloat16(_largest(values))
    codebook = np.unique((values / step).astype(np.float16)).astype(np.float64)
    levels = Levels(len(codebook), step, tuple(codebook.tolist()))
    return Quantized(levels, levels.nearest(z), "flat", 0)


def with_best_model(levels: Levels, indices: Indices) -> Quantized:
    """Return indices with the frequency model under which they take the fewest bits before any learning."""
    counts = np.bincount(indices, minlength=levels.count)
    best: tuple[float, frequencies.Shape, int] = (_flat_cost(counts), "flat", 0)
    offsets = np.abs(np.arange(levels.count) - (levels.count - 1) / 2)
    bells: tuple[tuple[frequencies.Shape, float], ...] = (
        ("gaussian", np.sqrt((counts * offsets**2).sum() / counts.sum())),
        ("laplace", (counts * offsets).sum() / counts.sum()),
    )
    for shape, spread in bells:
        guess = round(16 * (np.log2(max(float(spread), 1e-9)) + 3))
        for width in range(max(guess - 24, 0), min(guess + 25, 256)):
            cost = float(counts @ frequencies.code_lengths(shape, width, levels.count))
            best = min(best, (cost, shape, width))
    return Quantized(levels, indices, best[1], best[2])


def _flat_cost(counts: Indices) -> float:
    """Bits under Krichevsky & Trofimov's estimator."""
    from math import lgamma, log

    n, k = int(counts.sum()), len(counts)
    nats = lgamma(n + k / 2) - lgamma(k / 2) - sum(lgamma(c + 0.5) - lgamma(0.5) for c in counts.tolist())
    return nats / log(2)


def _squared_error(z: Array, levels: Levels) -> float:
    return float(np.square(z - levels.values()[levels.nearest(z)]).sum())


def _largest(z: Array) -> float:
    return float(np.max(np.abs(z))) or 1.0
