"""Both sides protected: the matrices ΔW (p, q) with UᵀΔW = 0 and ΔW V = 0.

    project(A) = lift(A) = (I − U Uᵀ) A (I − V Vᵀ)

The directions in which a weight W = U_h S_h V_hᵀ + U_l S_l V_lᵀ may move without touching its leading singular pairs
(U_h, V_h).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.subspaces.base import ALL, Members, Subspace


class TwoSided(Subspace):
    """Everything orthogonal to U on the left and to V on the right; coordinates are of the weight's shape.

    Args:
        protected: parameter name -> (U (p, k), V (q, k)), orthonormal columns; a name that is absent is unconstrained.
    """

    protects = True
    full_size = True
    linear_in_place = True

    def __init__(self, protected: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__(side="right")
        self.protected = dict(protected or {})

    @override
    def setup(self, device: torch.device) -> None:
        B, p, q = self.shape
        pairs = [self.protected.get(n) for n in self.names]
        for name, pair in zip(self.names, pairs, strict=True):
            if pair is not None and (pair[0].shape[0] != p or pair[1].shape[0] != q):
                shapes = [tuple(t.shape) for t in pair]
                raise ValueError(f"protected pair of '{name}' has shapes {shapes}, expected ({p}, k) and ({q}, k)")
        width = max((pair[0].shape[1] for pair in pairs if pair is not None), default=0)
        # Zero columns protect nothing, so pairs of different widths share one stack.
        U, V = torch.zeros(B, p, width, device=device), torch.zeros(B, q, width, device=device)
        free = torch.ones(B, 1, 1, device=device)
        for i, pair in enumerate(pairs):
            if pair is not None:
                k = pair[0].shape[1]
                U[i, :, :k], V[i, :, :k] = pair[0].to(device), pair[1].to(device)
                free[i] = float(k < min(p, q))  # else it may not move, not even by rounding
        self.state = {"left": U, "right": V}
        self.free = free

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return self.shape

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        return None

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        U, V = self.state["left"][members], self.state["right"][members]
        Z = A.to(U.dtype)
        if U.shape[-1]:
            Z = linalg.project_complement(linalg.project_complement(Z, V).mT, U).mT
            Z = Z * self.free[members]
        return Z if out is None else out.copy_(Z)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return self.project(Z, members)
