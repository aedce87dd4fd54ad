"""The Stiefel manifold of n x k matrices with orthonormal columns, with the Euclidean (embedded) metric."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul, upcast
from subspace_lab.manifolds.base import OrthonormalColumns, Retraction, check_method, polar, polish


class Stiefel(OrthonormalColumns):
    """Points S (..., n, k) with SᵀS = I; tangent vectors have skew-symmetric SᵀV.

    Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIMAX 1998, §2.2.
    """

    @full_precision
    def tangent(self, S: Tensor, G: Tensor) -> Tensor:
        """G - S sym(SᵀG) (their eq. 2.4)."""
        S = upcast(S)
        G = G.to(S.dtype)
        inner = matmul(S.mT, G)
        return G - matmul(S, 0.5 * (inner + inner.mT))

    @full_precision
    def retract(self, S: Tensor, V: Tensor, method: Retraction = "polar") -> Tensor:
        """Move from S along the tangent V.

        Args:
            S: (..., n, k) orthonormal.
            V: (..., n, k) tangent.
            method: ``polar`` is the matrix nearest to S + V (second order), ``qr`` its Q factor with positive
                diagonal (first order); neither synchronises. ``geodesic`` is [S, V] exp([[A, -B], [I, A]])
                [I; 0] exp(-A) with A = SᵀV, B = VᵀV (their eq. 2.7), then one Newton-Schulz step;
                torch.linalg.matrix_exp of the 2k x 2k matrix may synchronise on CUDA.

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
        k = S.shape[-1]
        inner = matmul(S.mT, V).double()
        A = 0.5 * (inner - inner.mT)
        B = matmul(V.mT, V).double()
        identity = torch.eye(k, dtype=A.dtype, device=A.device).expand_as(A)
        block = torch.cat([torch.cat([A, -B], dim=-1), torch.cat([identity, A], dim=-1)], dim=-2)
        factor = (torch.linalg.matrix_exp(block)[..., :k] @ torch.linalg.matrix_exp(-A)).to(S.dtype)
        return polish(matmul(S, factor[..., :k, :]) + matmul(V, factor[..., k:, :]))

    def transport(self, S: Tensor, V: Tensor, S_new: Tensor) -> Tensor:
        """Projection transport: the tangent part of V at S_new."""
        return self.tangent(S_new, V)
