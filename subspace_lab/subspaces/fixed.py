"""Given directions: ΔW = ΔB A for a fixed A (r, q), the first factor of an adapter that is merged as it is trained.

    project(G) = G Aᵀ       the gradient of B in W = W0 + B A
    lift(ΔB)   = ΔB A

so an optimizer in these coordinates takes, on W itself, exactly the steps it would take on B.  A need not be
orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.subspaces.base import ALL, Members, Subspace


class Given(Subspace):
    """The row space of given matrices.

    Args:
        bases: parameter name -> A (r, q); r may differ between weights.
        rows: parameter name -> rows of the weight that may move; all where it is absent.
    """

    protects = True

    def __init__(self, bases: Mapping[str, Tensor], rows: Mapping[str, range] | None = None) -> None:
        super().__init__(side="right")
        self.bases = dict(bases)
        self.rows = dict(rows or {})

    @override
    def setup(self, device: torch.device) -> None:
        B, p, q = self.shape
        missing = [n for n in self.names if n not in self.bases]
        if missing:
            raise ValueError(f"no directions were given for '{missing[0]}'")
        r = max(1, max(self.bases[n].shape[0] for n in self.names))
        basis, mask = torch.zeros(B, q, r, device=device), torch.ones(B, p, 1, device=device)
        for i, name in enumerate(self.names):
            A = self.bases[name]
            if A.ndim != 2 or A.shape[1] != q:
                raise ValueError(f"directions of '{name}' have shape {tuple(A.shape)}, expected (r, {q})")
            basis[i, :, : A.shape[0]] = A.mT.to(device)
            if name in self.rows:
                chosen = self.rows[name]
                mask[i, : chosen.start] = 0
                mask[i, chosen.stop :] = 0
        self.state = {"basis": basis, "rows": mask}

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return (self.shape[0], self.shape[1], self.state["basis"].shape[-1])

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        return None

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        basis = self.state["basis"][members]
        Z = torch.bmm(A.to(basis.dtype), basis) * self.state["rows"][members]
        return Z if out is None else out.copy_(Z)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return (Z * self.state["rows"][members]) @ self.state["basis"][members].mT
