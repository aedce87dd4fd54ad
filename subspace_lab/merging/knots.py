"""KnOTS: the updates of all tasks in one common basis, where they can be compared, then merged entry by entry.

Stoica, Ramesh, Ecsedi, Choshen & Hoffman, "Model merging with SVD to tie the Knots", ICLR 2025, arXiv 2410.19735;
released code gstoica27/KnOTS.  For a matrix, with the updates side by side:

    [D_1 … D_T] = U S [V_1 … V_T],   singular values up to 1e-5 dropped;      Z_t = S V_t = Uᵀ D_t
    update = U · merge(Z_1 … Z_T)

where `merge` is TIES (keep each task's largest entries, elect a sign for every place, mean of those that agree; arXiv
2306.01708) or the sum.  Z_t = Uᵀ D_t needs U alone, which is found from Σ_t D_t D_tᵀ in float64.

Everything that is no matrix: the mean of the D_t.  The release merges LoRA weights and nothing else.  It also chooses
each task's largest entries among those of all matrices together; here it is done matrix by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.leading_eigh import leading_eigh
from subspace_lab.linalg.precision import matmul
from subspace_lab.linalg.thin_svd import double_gram, double_product
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.ties import TIES

_SMALLEST = 1e-5
_ROWS = 256


class KnOTS(Merge):
    """KnOTS.

    Args:
        inner: ties, or sum: what is done with the tasks' coordinates.
        density: share of each task's coordinates that TIES keeps.
        scale: λ.
    """

    concurrent: ClassVar[bool] = True

    def __init__(self, inner: Literal["ties", "sum"] = "ties", density: float = 0.2, scale: float = 0.6) -> None:
        super().__init__(scale)
        if not 0 < density <= 1:
            raise UserError(f"method.density must be above 0 and at most 1, got {density}")
        self.inner, self.density = inner, density

    @override
    def update(self, stack: Stack) -> Tensor:
        if stack.kind != "matrix" or not math.prod(stack.shape):
            return stack.mean()
        gram = double_gram(stack.delta(0).mT)
        for t in range(1, stack.models):
            gram.add_(double_gram(stack.delta(t).mT))
        values, U = leading_eigh(gram, gram.shape[-1], overwrite=True)
        del gram
        known = values.sqrt() > _SMALLEST
        U.mul_(known.unsqueeze(-2))
        coordinates = (double_product(stack.delta(t).mT, U).mT for t in range(stack.models))
        if self.inner == "sum":
            merged = reduce(Tensor.add_, coordinates)
        else:
            share = self.density * known.sum(dim=-1) * stack.shape[1]
            kept = share.floor().long().clamp_min(1)
            Z = [largest(Z_t, kept) for Z_t in coordinates]
            merged = Z[0]
            for parts in zip(*(torch.split(Z_t, _ROWS, dim=-2) for Z_t in Z), strict=True):
                parts[0].copy_(TIES(density=1).update(_Coordinates(parts)).view_as(parts[0]))
            del Z
        return matmul(U.to(merged.dtype), merged)


class _Coordinates(Stack):
    """Z_t of a stack of matrices, as one flat tensor whose base is 0."""

    kind = "other"

    def __init__(self, Z: Sequence[Tensor]) -> None:
        self._Z, self.names, self.models, self.shape = Z, ["Z"], len(Z), (Z[0].numel(),)

    @override
    def base(self) -> Tensor:
        return torch.zeros_like(self._Z[0]).view(1, -1)

    @override
    def tuned(self, t: int) -> Tensor:
        return self._Z[t].reshape(1, -1).clone()

    @override
    def delta(self, t: int) -> Tensor:
        return self.tuned(t)


def largest(Z: Tensor, kept: Tensor) -> Tensor:
    """Z (b, m, n) with as many of its largest entries as `kept` (b,) says; ties stay, the rest becomes 0.

    The bits of |Z| as an integer have the order of the numbers: the threshold is found one bit at a time by counting.
    """
    bits = Z.abs().flatten(1).view(torch.int64 if Z.dtype == torch.float64 else torch.int32)
    least = torch.zeros_like(bits[:, :1])
    for bit in reversed(range(8 * bits.element_size() - 1)):
        trial = least | (1 << bit)
        least = torch.where((bits >= trial).sum(dim=1, keepdim=True) >= kept.unsqueeze(1), trial, least)
    return Z.mul_((bits >= least).view_as(Z))
