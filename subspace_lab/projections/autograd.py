"""The projection as a differentiable function: gradient = the adjoint, whatever kernel computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subspace_lab.projections.base import Projection, Rows


class Lift(torch.autograd.Function):
    """base + P z with gradients Pᵀ g for z and g for base."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, base: Tensor | None, projection: Projection, rows: Rows | None) -> Tensor:
        """Compute `Projection.lift`."""
        ctx.projection, ctx.rows = projection, rows
        return projection.lift(z, base=base, rows=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Compute `Projection.project`, only if somebody asks for it."""
        z = ctx.projection.project(g, rows=ctx.rows) if ctx.needs_input_grad[0] else None
        return z, g if ctx.needs_input_grad[1] else None, None, None


def apply(projection: Projection, z: Tensor, base: Tensor | None = None, *, rows: Rows | None = None) -> Tensor:
    """Return base + P[rows] z, differentiable once in z and base.

    Args:
        projection: P, D × d.
        z: (d,).
        base: (rows,) of the same dtype; None is zero.
        rows: (start, stop), default all.

    Returns:
        (rows,) in the dtype of z.
    """
    result: Tensor = Lift.apply(z, base, projection, rows)
    return result
