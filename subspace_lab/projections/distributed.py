"""Rows shared among ranks: each holds some rows of θ and its gradient, and d numbers are all that travels.

θ_r = θ0_r + P[rows_r] z          no traffic: every rank makes its own rows of P from the seed
∇z  = Σ_r P[rows_r]ᵀ g_r          one all-reduce of d numbers
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from subspace_lab.projections.base import Projection, Rows


def shard(D: int, rank: int, world_size: int) -> Rows:
    """Rows of a rank: consecutive, in the order of ranks, equal in number up to one."""
    return rank * D // world_size, (rank + 1) * D // world_size


def sharded_lift(
    projection: Projection, z: Tensor, rows: Rows, *, base: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """This rank's rows of base + P z, (rows,), from the replicated z (d,): no communication."""
    return projection.lift(z, base=base, out=out, rows=rows)


def sharded_project(
    projection: Projection, g_shard: Tensor, rows: Rows, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Pᵀ g (d,) on every rank, from each rank's rows of g.

    Args:
        projection: the same on all ranks.
        g_shard: (rows,) this rank's part of the gradient, of the same dtype on all ranks.
        rows: (start, stop) of this rank. Together the ranks hold each row once: `shard` is one way.
        group: process group, default all ranks.

    Returns:
        (d,) in the dtype of g_shard. Sums are formed and sent in float32 (float64 for float64).
    """
    work = g_shard if g_shard.dtype == torch.float64 else g_shard.float()
    z = projection.project(work, rows=rows)
    dist.all_reduce(z, group=group)
    return z.to(g_shard.dtype)
