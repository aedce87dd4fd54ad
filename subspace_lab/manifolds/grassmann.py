"""The Grassmann manifold of k-dimensional subspaces of R^n, represented by orthonormal bases."""

from __future__ import annotations

from torch import Tensor

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul, upcast
from subspace_lab.manifolds.base import OrthonormalColumns, Retraction, check_method, polar, polish
from subspace_lab.manifolds.gram import cos_sinc


class Grassmann(OrthonormalColumns):
    """Subspaces span(S), S (..., n, k) with SᵀS = I; S and S Q are the same point for orthogonal Q.

    Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIMAX 1998, §2.5.
    Tangent vectors are horizontal lifts: SᵀV = 0.
    """

    @full_precision
    def tangent(self, S: Tensor, G: Tensor) -> Tensor:
        """G - S SᵀG (their eq. 2.70)."""
        S = upcast(S)
        G = G.to(S.dtype)
        return G - matmul(S, matmul(S.mT, G))

    @full_precision
    def retract(self, S: Tensor, V: Tensor, method: Retraction = "polar") -> Tensor:
        """Move from S along the horizontal V.

        Args:
            S: (..., n, k) orthonormal.
            V: (..., n, k) horizontal.
            method: ``polar`` (nearest basis to S + V) and ``qr`` reach the same subspace, O(‖V‖³) from the
                geodesic's end; polar also keeps the basis there, qr turns it. ``geodesic`` is exact: with VᵀV
                = W diag(s²) Wᵀ, S W cos(s) Wᵀ + V W (sin(s)/s) Wᵀ (their eq. 2.65 without the tall SVD), then
                one Newton-Schulz step. None of the three synchronises.

        Returns:
            (..., n, k), ‖SᵀS - I‖ at rounding however many steps are taken.
        """
        check_method(method)
        S = upcast(S)
        V = V.to(S.dtype)
        if method == "polar":
            return polar(S + V)
        if method == "qr":
            return orthonormalize(S + V)
        cosine, sinc = cos_sinc(matmul(V.mT, V).double())
        return polish(matmul(S, cosine.to(S.dtype)) + matmul(V, sinc.to(S.dtype)))

    def transport(self, S: Tensor, V: Tensor, S_new: Tensor) -> Tensor:
        """Projection transport: the horizontal part of V at S_new."""
        return self.tangent(S_new, V)
