"""Isotropic merging: one singular value for every direction of the merged update.

Marczak, Magistri, Cygert, Twardowski, Bagdanov & van de Weijer, "No Task Left Behind: Isotropic Model Merging with
Common and Task-Specific Subspaces", ICML 2025, arXiv 2502.04959; released code danielm1405/iso-merging.  For a matrix
with r = min(m, n):

    Iso-C      D = Σ_t D_t = U S Vᵀ,      update = mean(S) U Vᵀ = (‖D‖_* / r) polar(D)

    Iso-CTS    q  = round((r − ⌊f r⌋) / T) directions for each task, k = r − T q common ones, f the common fraction
               U_c, S_c, V_c = k leading triplets of D
               U_t, S_t, V_t = q leading triplets of D_t − U_c U_cᵀ D_t       (the left projection alone)
               U* = polar [U_1 … U_T, U_c],   V* = polar [V_1 … V_T, V_c],    update = mean(S_1 … S_T, S_c) U* V*ᵀ

Everything that is no matrix: the mean of the D_t.  As in the paper, λ is chosen on validation data from 0.1, 0.2, … 3.

Unlike the release, directions in which D is zero stay so (it gives them mean(S) too, in directions of LAPACK's own
choice).  The same result is reached with less: the columns of U_t are orthogonal to U_c; if m ≤ n, U is complete, and
U_perpᵀ D_t, T q rows, replaces the m rows of the projected matrix; see `polar_beside` for V*.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.polar import polar, polar_and_norm, polar_beside
from subspace_lab.linalg.precision import matmul, subtract_product
from subspace_lab.linalg.thin_svd import Factors, negligible, significant, thin_svd, top_k
from subspace_lab.merging.base import Stack
from subspace_lab.merging.spectral import SpectralMerge


class IsoC(SpectralMerge):
    """Iso-C.

    On a GPU nothing but matrix products: mean(S) comes from ⟨polar(D), D⟩, and no SVD is needed.

    Args:
        scale: λ.
    """

    @override
    def update(self, stack: Stack) -> Tensor:
        if stack.kind != "matrix":
            return stack.mean()
        return isotropic(stack.total())


class IsoCTS(SpectralMerge):
    """Iso-CTS.

    Args:
        common_space_fraction: f in [0, 1]: share of the directions that come from the sum; 1 is Iso-C.
        scale: λ.
    """

    def __init__(self, common_space_fraction: float = 0.8, scale: float = 1.0) -> None:
        super().__init__(scale)
        if not 0 <= common_space_fraction <= 1:
            raise UserError(f"method.common_space_fraction must be between 0 and 1, got {common_space_fraction}")
        self.common_space_fraction = common_space_fraction

    def split(self, r: int, T: int) -> tuple[int, int]:
        """How many directions are common, and how many each of T tasks has, of r."""
        q = min(round((r - int(r * self.common_space_fraction)) / T), r // T)
        return r - T * q, q

    @override
    def update(self, stack: Stack) -> Tensor:
        if stack.kind != "matrix":
            return stack.mean()
        D = stack.total()
        k, q = self.split(min(stack.shape), stack.models)
        if not q:
            return isotropic(D)
        U, S, V = thin_svd(D)
        del D
        known = significant(S)[..., None, :k]
        complete = bool(known.all())
        U_c = U[..., :k]
        if not complete:
            U_c.mul_(known)
            V[..., :k].mul_(known)
        # The T q directions that U has left are all there are besides U_c if m <= n.
        U_perp = U[..., k:] if complete and stack.shape[0] <= stack.shape[1] else None
        found = [self._own(stack, t, q, U_c, U_perp) for t in range(stack.models)]
        U_t, S_t, V_t = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        del found
        # What U and V have beside the common directions makes room for the tasks'.
        if complete:
            outside = subtract_product(U_t, U_c, matmul(U_c.mT, U_t)) if U_perp is None else U_t
            U_t = polar(outside, overwrite=True)
            U[..., k:] = U_t if U_perp is None else matmul(U_perp, U_t)
            V[..., k:] = V_t
            V = polar_beside(V, k)
        else:
            U[..., k:], V[..., k:] = U_t, V_t
            U, V = polar(U, overwrite=True), polar(V, overwrite=True)
        mean = torch.cat([S_t, S[..., :k]], dim=-1).mean(dim=-1)
        return matmul(U, V.mT).mul_(mean[:, None, None])

    @staticmethod
    def _own(stack: Stack, t: int, q: int, U_c: Tensor, U_perp: Tensor | None) -> Factors:
        """The q leading triplets of what D_t has outside the common left directions."""
        D = stack.delta(t)
        length = torch.stack([one.norm() for one in D.flatten(1)])
        rest = matmul(U_perp.mT, D) if U_perp is not None else subtract_product(D, U_c, matmul(U_c.mT, D))
        return _unless_noise(top_k(rest, q), length)


def isotropic(D: Tensor) -> Tensor:
    """mean(S) U Vᵀ (b, m, n) of D = U diag(S) Vᵀ, whose place it takes."""
    P, total = polar_and_norm(D, overwrite=True)
    return P.mul_((total / max(1, min(D.shape[-2:])))[:, None, None])


def _unless_noise(triplets: Factors, length: Tensor) -> Factors:
    """Triplets of what a projection left of matrices of that length (b,), without those that are rounding errors."""
    U, S, V = triplets
    kept = torch.gt(S, negligible(S.dtype) * length.unsqueeze(-1))
    return U * kept.unsqueeze(-2), S * kept, V * kept.unsqueeze(-2)
