"""Taking protected directions out of the rows of a matrix, whichever way is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.linalg.precision import matmul


@dataclass(frozen=True)
class Removal:
    """A -> A − A M Λ Mᵀ for A (…, p, d).

    Attributes:
        factors: (…, d, r): M itself, or an orthonormal basis N of its complement, when M fills more than half the
            space: then A N Nᵀ is the same for less.
        onto: whether `factors` is N.
        weights: diagonal of Λ (…, 1, r), each in [0, 1]; None is the identity (SGP's importance, see
            `subspace_lab.methods.continual.projection`).
    """

    factors: Tensor
    onto: bool = False
    weights: Tensor | None = None

    @classmethod
    def of(cls, M: Tensor, importance: Tensor | None = None) -> Removal:
        """Removal of the columns of M (d, k), orthonormal; with `importance` (k,) only in part."""
        if importance is not None:
            return cls(M, weights=importance.unsqueeze(-2))
        if 2 * M.shape[-1] > M.shape[-2]:
            return cls(complement_basis(M), onto=True)
        return cls(M)

    def to(self, device: torch.device) -> Removal:
        """The same on another device."""
        return Removal(self.factors.to(device), self.onto, None if self.weights is None else self.weights.to(device))

    def __call__(self, A: Tensor) -> Tensor:
        """The rest of A, in float32 (float64 if A is); full precision inside autocast too."""
        if torch.is_autocast_enabled(A.device.type):
            with torch.autocast(A.device.type, enabled=False):
                return self._remove(A)
        return self._remove(A)

    def _remove(self, A: Tensor) -> Tensor:
        F = self.factors
        if A.dtype is not F.dtype:
            A = A.to(torch.promote_types(A.dtype, F.dtype))
            F = F.to(A.dtype)
        Z = matmul(A, F)
        if self.weights is not None:
            Z = Z * self.weights
        inside = matmul(Z, F.mT)
        return inside if self.onto else A - inside


def complement_basis(M: Tensor) -> Tensor:
    """Orthonormal basis N (d, d − k) of everything orthogonal to the orthonormal columns of M (d, k), in M's dtype."""
    k = M.shape[1]
    Q, _ = torch.linalg.qr(M.double(), mode="complete")
    N: Tensor = Q[:, k:].to(M.dtype).contiguous()
    return N
