"""The orthogonal complement of a protected space: A − A M Mᵀ, same size as A.

Gradient projection memory (Saha, Garg & Roy 2021, arXiv 2103.09762, eq. 8) and the history constraint of CoSO.
The lift projects again: Adam's division by √V takes even a projected gradient out of the complement.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.subspaces.base import ALL, Members, Side, Subspace


class Complement(Subspace):
    """Everything orthogonal to the columns of M.

    Args:
        protected: parameter name -> M (q, k), orthonormal columns; a name that is absent is unconstrained.
        side: the side that M lives on; ``right`` is a linear layer's input space.
    """

    protects = True
    full_size = True

    def __init__(self, protected: Mapping[str, Tensor] | None = None, *, side: Side = "right") -> None:
        super().__init__(side=side)
        self.protected = dict(protected or {})

    @override
    def setup(self, device: torch.device) -> None:
        B, _, q = self.shape
        bases = [self.protected.get(n) for n in self.names]
        for name, M in zip(self.names, bases, strict=True):
            if M is not None and (M.ndim != 2 or M.shape[0] != q or M.shape[1] > q):
                raise ValueError(f"protected basis of '{name}' has shape {tuple(M.shape)}, expected ({q}, k ≤ {q})")
        width = max((M.shape[1] for M in bases if M is not None), default=0)
        # Zero columns protect nothing, so bases of different widths share one stack.
        M_all = torch.zeros(B, q, width, device=device)
        for i, M in enumerate(bases):
            if M is not None:
                M_all[i, :, : M.shape[1]] = M.to(device)
        self.state["protected"] = M_all

    @property
    def width(self) -> int:
        """The largest number of protected directions in the stack."""
        return self.state["protected"].shape[-1]

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return self.shape

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        return None

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        M = self.state["protected"][members]
        A = A.to(M.dtype)
        inside = linalg.project_complement(A, M) if M.shape[-1] else A
        return inside if out is None else out.copy_(inside)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return self.project(Z, members)
