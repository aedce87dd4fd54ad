"""The tangent space of a manifold at the current weight; after the step the weight is retracted onto it."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.manifolds import Manifold
from subspace_lab.subspaces.base import ALL, Members, Side, Subspace


class Tangent(Subspace):
    """Keep weights on a manifold: project to the tangent space, act, project again, retract.

    Moments live in the ambient space and are projected when used, which stands in for transport (as in the
    released GCR optimizer).  The matrices' columns along the long side are the manifold's orthonormal vectors:
    stacks are (B, n, k) with k ≤ n.

    Args:
        manifold: gives `tangent(S, G)` and `retract(S, V)`.
    """

    every_step = True
    needs_weight = True
    protects = True
    full_size = True
    derived = frozenset({"point"})

    def __init__(self, manifold: Manifold, *, side: Side = "short") -> None:
        super().__init__(side=side)
        self.manifold = manifold

    @override
    def setup(self, device: torch.device) -> None:
        self.state["point"] = torch.zeros(self.shape, device=device)

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return self.shape

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        assert weight is not None
        self.state["point"][members] = weight.float()

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        Z = self.manifold.tangent(self.state["point"][members], A.float())
        return Z if out is None else out.copy_(Z)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return self.project(Z, members)

    @override
    def retract(self, weight: Tensor, U: Tensor, members: Members = ALL) -> Tensor:
        return self.manifold.retract(weight.float(), U)
