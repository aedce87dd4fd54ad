"""Aggregation rules that survive clients who send anything: Krum, Multi-Krum, median, trimmed mean and Bulyan.

Krum: Blanchard, El Mhamdi, Guerraoui & Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NeurIPS 2017, arXiv 1703.02757.  Median and trimmed mean: Yin, Chen, Ramchandran & Bartlett,
"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, arXiv 1803.01498.  Bulyan: El
Mhamdi, Guerraoui & Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018, arXiv
1802.07927.  Of p updates V_i, f may be anything:

    Krum          s(i) = Σ_{i→j} |V_i − V_j|², over the p − f − 2 nearest of V_i;  V at the least s          p ≥ 2 f + 3
    Multi-Krum    the mean of the m updates with the least s
    median        of each coordinate
    trimmed mean  of each coordinate, without its f largest and its f smallest values                        p > 2 f
    Bulyan        θ = p − 2 f updates, each Krum's choice among those not yet chosen; of each coordinate of
                  these the mean of the β = θ − 2 f values that are nearest to their median                  p ≥ 4 f + 3

==========  =======================================================
symbol      here
==========  =======================================================
V           ``updates`` (p, n), a row for each client
f           ``f``, the number of arbitrary rows that are declared
m           ``m``
==========  =======================================================

Rows are told apart by their p × p distances alone; coordinates are sorted by a network of minima and maxima over rows,
in blocks that fit a cache.  A row with a NaN or an infinity is infinitely far from all others, and its NaN are infinite
as coordinates.  The median of an even number of values is the mean of the two in the middle.

Garfield, whose rules the release of the Flag Aggregator compares with, differs: Krum adds up distances instead of their
squares, over the p − f − 1 nearest, and its default is m = p − f − 2; Bulyan takes p − 2 f − 2 means of Multi-Krum,
whose scores are not renewed when a row is taken out; the median of an even number is the lower of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision

_BLOCK = {"cpu": 1 << 14}  # columns at a time: 100 float32 rows of them fit a second-level cache
_LARGE_BLOCK = 1 << 20


def blocks(updates: Tensor) -> list[slice]:
    """Ranges of columns to work on one after the other."""
    step = _BLOCK.get(updates.device.type, _LARGE_BLOCK)
    return [slice(start, start + step) for start in range(0, updates.shape[1], step)]


@full_precision
def gram(updates: Tensor) -> Tensor:
    """V Vᵀ (p, p), symmetric, in float64, summed up in float64 in a single pass over V (p, n)."""
    G = updates.new_zeros(len(updates), len(updates), dtype=torch.float64)
    for columns in blocks(updates):
        block = updates[:, columns].double()
        G.addmm_(block, block.T)
    return (G + G.T) / 2  # equal to the last bit: scores of mutual neighbours are compared


def squared_distances(updates: Tensor) -> Tensor:
    """|V_i − V_j|² (p, p), float64, on the CPU; infinite on the diagonal and for rows that are not finite."""
    G = gram(updates).cpu()
    lengths = G.diagonal()
    distances = (lengths[:, None] + lengths[None, :] - 2 * G).clamp_min(0)
    distances.fill_diagonal_(torch.inf)
    return distances.masked_fill_(distances.isnan(), torch.inf)


def krum(updates: Tensor, f: int, m: int | None = 1) -> Tensor:
    """Krum, and Multi-Krum for m > 1.

    Args:
        updates: V (p, n).
        f: arbitrary rows, at most (p − 3) / 2.
        m: how many of the best rows are averaged, 1 … p − f − 2; None: p − f − 2.

    Returns:
        (n,).

    Raises:
        ValueError: f or m does not go with p.
    """
    p = len(updates)
    m = p - f - 2 if m is None else m
    if f < 0 or p < 2 * f + 3 or not 1 <= m <= p - f - 2:
        raise ValueError(f"Krum of {p} updates with f={f}, m={m}: it needs p >= 2 f + 3 and m <= p - f - 2")
    best = _by_score(squared_distances(updates), p - f - 2)[:m]
    return over_columns(updates, lambda block: block[best].mean(dim=0))


def median(updates: Tensor) -> Tensor:
    """The median of each coordinate of (p, n): (n,)."""
    p = len(updates)
    return over_columns(updates, lambda block: _middle(sort_rows(block), p))


def trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """The mean of each coordinate without its f largest and f smallest values.

    Args:
        updates: V (p, n).
        f: arbitrary rows, less than p / 2.

    Returns:
        (n,).

    Raises:
        ValueError: nothing would be left.
    """
    p = len(updates)
    if f < 0 or p <= 2 * f:
        raise ValueError(f"trimmed mean of {p} updates with f={f}: it needs p > 2 f")
    return over_columns(updates, lambda block: torch.stack(sort_rows(block)[f : p - f]).mean(dim=0))


def bulyan(updates: Tensor, f: int) -> Tensor:
    """Bulyan over Krum.

    Args:
        updates: V (p, n).
        f: arbitrary rows, at most (p − 3) / 4.

    Returns:
        (n,).

    Raises:
        ValueError: f does not go with p.
    """
    p = len(updates)
    if f < 0 or p < 4 * f + 3:
        raise ValueError(f"Bulyan of {p} updates with f={f}: it needs p >= 4 f + 3")
    distances = squared_distances(updates)
    left = list(range(p))
    chosen: list[int] = []
    while len(chosen) < p - 2 * f:
        among = distances[left][:, left]
        # Towards the end p − f − 2 nearest would be none: a single one then.
        chosen.append(left.pop(_by_score(among, max(len(left) - f - 2, 1))[0]))
    return over_columns(updates, lambda block: _nearest_to_median(sort_rows(block[chosen]), 2 * f))


def over_columns(updates: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a rule (p, b) -> (b,) to blocks of columns: nothing of the size of (p, n) is made."""
    out = updates.new_empty(updates.shape[1])
    for columns in blocks(updates):
        out[columns] = rule(updates[:, columns])
    return out


def sort_rows(block: Tensor) -> list[Tensor]:
    """Each coordinate of (p, b) in ascending order, as p rows (b,); NaN count as infinite.

    Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2M): a fixed list of compare and exchange,
    whole rows at a time, five to ten times faster than `torch.sort` on a CPU.
    """
    rows = list(torch.nan_to_num(block, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).unbind(0))
    for low, high in _network(len(rows)):
        rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    return rows


@lru_cache(maxsize=64)
def _network(p: int) -> tuple[tuple[int, int], ...]:
    """The pairs of positions that merge exchange compares, in order."""
    pairs: list[tuple[int, int]] = []
    top = 1 << max((p - 1).bit_length() - 1, 0)
    half = top if p > 1 else 0
    while half:
        reach, skip, distance = top, 0, half
        while distance:
            pairs += [(i, i + distance) for i in range(p - distance) if i & half == skip]
            distance, reach, skip = (reach - half, reach // 2, half) if reach > half else (0, reach, skip)
        half //= 2
    return tuple(pairs)


def _by_score(distances: Tensor, nearest: int) -> list[int]:
    """Rows of (p, p) by Krum's score, the best one first.

    Two mutually nearest rows share a score over a single neighbour: of these the one nearer to all rows comes first, so
    that the choice does not depend on the order of the rows.
    """
    score = distances.sort(dim=1).values[:, :nearest].sum(dim=1)
    reach = distances.masked_fill(distances.isinf(), 0).sum(dim=1)
    return sorted(range(len(score)), key=list(zip(score.tolist(), reach.tolist(), strict=True)).__getitem__)


def _middle(rows: Sequence[Tensor], p: int) -> Tensor:
    low, high = rows[(p - 1) // 2], rows[p // 2]
    return low if low is high else low + (high - low) / 2


def _nearest_to_median(rows: list[Tensor], drop: int) -> Tensor:
    """Mean of all but `drop` of the sorted values (θ, b): those nearest to the median, which are neighbours."""
    middle, keep = _middle(rows, len(rows)), len(rows) - drop
    # A window's sum is that of the end of one piece of `keep` rows and of the beginning of the next.  Nothing is taken
    # off again, which would leave the rounding of rows that are far away.
    begins, ends = list(rows), list(rows)
    for place in range(1, len(rows)):
        if place % keep:
            begins[place] = begins[place - 1] + rows[place]
    for place in range(len(rows) - 2, -1, -1):
        if (place + 1) % keep:
            ends[place] = ends[place + 1] + rows[place]
    total, least = torch.zeros_like(middle), torch.full_like(middle, torch.inf)
    for start in range(drop + 1):
        stop = start + keep - 1
        farthest = torch.maximum(middle - rows[start], rows[stop] - middle)
        window = ends[start] + begins[stop] if start % keep else ends[start]
        total = torch.where(farthest < least, window, total)
        least = torch.minimum(farthest, least)
    return total / keep
