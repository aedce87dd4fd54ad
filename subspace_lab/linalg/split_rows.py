"""Matrices whose rows lie on several processes: what a kernel must add up to see the whole.

For A (..., p, q) with p split, A P keeps its rows where they are, and the products that the split dimension is summed
over, AᵀY (q, r) and YᵀY (r, r), are sums of what each process has. Nothing of size p × q ever leaves its process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SplitRows:
    """The processes that hold the rows of the same matrices; every method is a collective of all of them.

    Args:
        group: the processes; None for all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' x, in place; any dtype that is summed, contiguous."""
        import torch.distributed as dist

        x = x.contiguous()
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of the processes' x; inf where any of them is not finite."""
        import torch.distributed as dist

        x = x.nan_to_num(nan=float("inf"), posinf=float("inf")).contiguous()
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


def total(x: Tensor, rows: SplitRows | None) -> Tensor:
    """`x` itself where one process has all rows, else the processes' sum."""
    return x if rows is None else rows.total(x)


def orthonormal_columns(Y: Tensor, rows: SplitRows) -> Tensor:
    """Orthonormal columns with the span of Y (..., p, k), whose rows are split; columns that Y leaves open are zero.

    Y W Λ^(-1/2) from the eigenvectors of YᵀY, twice: squaring the condition costs the first pass its accuracy, the
    second starts at a condition of nearly one. What travels is k × k, in float64.
    """
    Q = Y.double()
    for _ in range(2):
        values, W = torch.linalg.eigh(rows.total(Q.mT @ Q))
        known = values > 1e-12 * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
        Q = (Q @ W) * torch.where(known, values, 1.0).rsqrt().mul(known).unsqueeze(-2)
    return Q.to(Y.dtype)
