"""Matrices whose rows lie on several processes: what a kernel must add up to see the whole.

For A (..., p, q) with p split, A P keeps its rows where they are, and the products that the split dimension is summed
over, AᵀY (q, r) and YᵀY (r, r), are sums of what each process has. Nothing of size p × q ever leaves its process. The
bases P (q, r), which all of them need, are kept in parts too and gathered for the moment they are used in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SplitRows:
    """The processes that hold the rows of the same matrices; they call `total`, `largest` and `gather` together.

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

    @property
    def processes(self) -> int:
        """How many they are."""
        import torch.distributed as dist

        return dist.get_world_size(self.group)

    def mine(self, X: Tensor) -> Tensor:
        """This process's rows of X (..., n, r), which all have: ceil(n / processes), the last ones fewer or none.

        As DTensor cuts, which FSDP2's parameters are.
        """
        import torch.distributed as dist

        n, rank = X.shape[-2], dist.get_rank(self.group)
        each = -(-n // self.processes)
        start = min(rank * each, n)
        return X.narrow(-2, start, min(each, n - start))

    def own(self, P: Tensor) -> Tensor:
        """This process's part of a basis P (..., q, r), as long as everybody's: zeros stand past the end."""
        mine = self.mine(P)
        missing = -(-P.shape[-2] // self.processes) - mine.shape[-2]
        return torch.nn.functional.pad(mine, (0, 0, 0, missing)).contiguous()

    def gather(self, part: Tensor, q: int) -> Tensor:
        """The basis (b, q, r) of which each process has its `own` part (b, ceil(q / processes), r)."""
        import torch.distributed as dist

        b, each, r = part.shape
        parts = part.new_empty(self.processes * b, each, r)
        dist.all_gather_into_tensor(parts, part.contiguous(), group=self.group)
        return parts.view(self.processes, b, each, r).transpose(0, 1).reshape(b, -1, r)[:, :q]


def total(x: Tensor, rows: SplitRows | None) -> Tensor:
    """`x` itself where one process has all rows, else the processes' sum."""
    return x if rows is None else rows.total(x)


def orthonormal_columns(Y: Tensor, rows: SplitRows, *, passes: int = 2) -> Tensor:
    """Orthonormal columns with the span of Y (..., p, k), whose rows are split; columns that Y leaves open are zero.

    Y W Λ^(-1/2) from the eigenvectors of YᵀY. Squaring the condition costs a first pass its accuracy; a second starts
    at a condition of nearly one. What travels is k × k, in float64.

    Args:
        Y: any floating dtype.
        rows: the processes that hold the rows.
        passes: one is enough between two power iterations.
    """
    Q = Y.double()
    for _ in range(passes):
        values, W = torch.linalg.eigh(rows.total(Q.mT @ Q))
        known = values > 1e-12 * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
        Q = (Q @ W) * torch.where(known, values, 1.0).rsqrt().mul(known).unsqueeze(-2)
    return Q.to(Y.dtype)
