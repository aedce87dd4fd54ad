"""TIES: trim small changes, elect a sign for every parameter, merge what agrees with it (Yadav et al., NeurIPS 2023).

arXiv 2306.01708, algorithm 1:  D̂_t keeps the k % of the entries of D_t that are largest in magnitude;
γ = sgn(Σ_t D̂_t);  U = mean of the D̂_t that are not 0 and have the sign γ, entry by entry;  W = W0 + λ U.

Variants in use: trimming each tensor by itself (`trim=tensor`: mergekit, peft) instead of the whole model at once, and
the sum instead of the mean (`combine=sum`: FusionBench).  Where the sum is exactly 0 no sign is elected and U is 0.

The threshold of a whole model needs no sorting and no copy: the bits of |D_t| as an integer have the order of the
numbers, and the k-th largest is found 16 bits at a time by counting (radix select) over streamed pieces, exactly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.grouping import compute_dtype
from subspace_lab.merging.sources import Sources
from subspace_lab.merging.stacks import visit

_SORTED = 1 << 16  # entries: up to here sorting is cheaper than tables of 65536 counts
# Calls a function with the number of a model and magnitudes of its changes, from several threads, until all were seen.
Visit = Callable[[Callable[[int, Tensor], None]], None]
_SHIFTS = {torch.float32: (15, 0), torch.float64: (47, 31, 15, 0)}


@dataclass(frozen=True)
class _Threshold:
    """Smallest magnitude that is kept, and how many entries reach it (other than zeros)."""

    value: float
    kept: int


class TIES(Merge):
    """Trim, elect signs, merge.

    Args:
        scale: λ.
        density: share k of the entries of a task vector that is kept; of equal magnitudes at the threshold all are.
        trim: global: the largest of the whole model (the paper); tensor: of each tensor (mergekit, peft).
        combine: mean of the agreeing entries (the paper) or their sum (FusionBench).

    Raises:
        UserError: density is not in (0, 1].
    """

    elementwise: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __init__(
        self,
        scale: float = 1.0,
        density: float = 0.2,
        trim: Literal["global", "tensor"] = "global",
        combine: Literal["mean", "sum"] = "mean",
    ) -> None:
        if not 0 < density <= 1:
            raise UserError(f"method.density must be above 0 and at most 1, got {density}")
        super().__init__(scale)
        self.density, self.trim, self.combine = density, trim, combine
        self._thresholds: dict[str, list[_Threshold]] = {}
        self._shares: list[float] = []

    @override
    def survey(self, sources: Sources) -> None:
        self._thresholds, self._shares = {}, []
        if self.density == 1:
            return
        infos = sources.infos()
        kept = [0] * sources.models
        for names in [list(infos)] if self.trim == "global" else [[name] for name in infos]:
            found = _thresholds(sources, names, self.density)
            kept = [total + threshold.kept for total, threshold in zip(kept, found, strict=True)]
            self._thresholds |= dict.fromkeys(names, found)
        entries = max(1, sum(info.numel for info in infos.values()))
        self._shares = [count / entries for count in kept]

    @override
    def update(self, stack: Stack) -> Tensor:
        # Either sign's entries are summed and counted; which of the two is elected is known at the end.
        sums: list[Tensor] = []
        for t, D in enumerate(stack.deltas()):
            D = self._trimmed(stack.names, t, D)
            up = functional.relu(D)
            new = [up, D - up]
            if self.combine == "mean":
                signs = D.sign_()
                new += [signs, signs.abs()]
            sums = [total.add_(one) for total, one in zip(sums, new, strict=True)] if sums else new
        up, down = sums[:2]
        elected = (up + down).sign_()
        above = functional.relu(elected)
        if self.combine == "mean":
            balance, count = sums[2:]  # those above 0 minus, and plus, those below
            count.addcmul_(balance, elected).mul_(0.5).clamp_(min=1)
            return up.mul_(above).addcmul_(down, above - elected).div_(count)
        return up.mul_(above).addcmul_(down, above - elected)

    def _trimmed(self, names: Sequence[str], t: int, D: Tensor) -> Tensor:
        """D̂_t of b tensors (b, …)."""
        if not self._thresholds:
            return D
        bounds = {name: _below(self._thresholds[name][t].value, D.dtype) for name in names}
        if len(set(bounds.values())) == 1:
            return functional.hardshrink(D, bounds[names[0]])
        return torch.stack([functional.hardshrink(row, bounds[name]) for name, row in zip(names, D, strict=True)])

    @override
    def metrics(self) -> dict[str, float]:
        return {"density": sum(self._shares) / len(self._shares)} if self._shares else {}


def _below(value: float, dtype: torch.dtype) -> float:
    """Largest number of the dtype that is smaller: hardshrink drops what is *not above* its bound."""
    near = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(near, torch.zeros_like(near)) if float(near) >= value else near)


def _thresholds(sources: Sources, names: list[str], density: float) -> list[_Threshold]:
    """Of every model, the smallest of its floor(density · entries) largest magnitudes in these tensors."""
    infos = sources.infos()
    entries = sum(infos[name].numel for name in names)
    double = any(compute_dtype(infos[name].dtype) == torch.float64 for name in names)
    dtype = torch.float64 if double else torch.float32
    k = max(1, math.floor(density * entries))

    def visit_magnitudes(look: Callable[[int, Tensor], None]) -> None:
        def work(stack: Stack) -> None:
            for t, D in enumerate(stack.deltas()):
                look(t, D.view(-1).to(dtype).abs_())

        visit(sources, work, names)

    if entries <= _SORTED:
        return _by_sorting(visit_magnitudes, sources.models, k)
    return _by_counting(visit_magnitudes, sources.models, k, _SHIFTS[dtype])


def _by_sorting(visit_magnitudes: Visit, models: int, k: int) -> list[_Threshold]:
    found: list[list[Tensor]] = [[] for _ in range(models)]
    visit_magnitudes(lambda t, values: found[t].append(values))
    thresholds = []
    for values in map(torch.cat, found):
        value = values.topk(k).values[-1]
        thresholds.append(_Threshold(float(value), int(((values >= value) & (values > 0)).sum())))
    return thresholds


def _by_counting(visit_magnitudes: Visit, models: int, k: int, shifts: tuple[int, ...]) -> list[_Threshold]:
    """Radix select: the k-th largest digit by digit, one pass over everything for each."""
    integer, floating = (torch.int64, torch.float64) if len(shifts) == 4 else (torch.int32, torch.float32)
    above, counted = [0] * models, [0] * models
    prefixes = [0] * models  # the digits found so far
    lock = threading.Lock()
    for i, shift in enumerate(shifts):
        width = (shifts[i - 1] if i else shift + 16) - shift
        counts: dict[int, Tensor] = {}

        def count(t: int, values: Tensor, i: int = i, width: int = width, counts: dict[int, Tensor] = counts) -> None:
            bits = values.view(integer)
            if i:
                bits = bits[bits >> shifts[i - 1] == prefixes[t]] & (2 ** shifts[i - 1] - 1)
            table = torch.bincount(bits.bitwise_right_shift_(shifts[i]), minlength=2**width)
            with lock:
                counts[t] = counts[t].add_(table) if t in counts else table

        visit_magnitudes(count)
        for t in range(models):
            table = counts[t].cpu()
            at_least = table.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
            digit = int((at_least >= k - above[t]).sum()) - 1
            counted[t] = int(table[digit])
            above[t] += int(at_least[digit]) - counted[t]
            prefixes[t] = prefixes[t] << width | digit
    values = torch.tensor(prefixes, dtype=integer).view(floating).tolist()
    return [_Threshold(value, above[t] + (counted[t] if value else 0)) for t, value in enumerate(values)]
