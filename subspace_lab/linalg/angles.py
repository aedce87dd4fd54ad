"""How far apart two subspaces are."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision, matmul, sanitize, upcast


@full_precision
def principal_angles(P: Tensor, Q: Tensor) -> Tensor:
    """Principal angles between span(P) and span(Q), accurate near 0 and near π/2.

    Cosines are the singular values of PᵀQ and sines those of the residual Q - P PᵀQ (Björck and Golub,
    "Numerical methods for computing angles between linear subspaces", 1973). arccos alone is wrong below 3e-4
    rad in float32, arcsin alone near π/2; atan2 of the two is right everywhere.

    Args:
        P: (..., n, k) orthonormal columns.
        Q: (..., n, l) orthonormal columns.

    Returns:
        Radians in [0, π/2], ascending, (..., min(k, l)); NaN where a basis is not finite.
        torch.linalg.svdvals checks LAPACK's status, a host synchronisation on CUDA: for reports, not for the
        step path.

    Raises:
        ValueError: P and Q live in spaces of different dimension.
    """
    if P.shape[-2] != Q.shape[-2]:
        raise ValueError(f"bases of different spaces: dimension {P.shape[-2]} and {Q.shape[-2]}")
    P, Q = upcast(P), upcast(Q)
    dtype = torch.promote_types(P.dtype, Q.dtype)
    P, Q = P.to(dtype), Q.to(dtype)
    if Q.shape[-1] > P.shape[-1]:
        P, Q = Q, P
    inner = matmul(P.mT, Q)
    residual = Q - matmul(P, inner)
    # The k x k triangular factor has the singular values of the tall residual.
    triangle = torch.linalg.qr(sanitize(residual), mode="r").R
    cosine = torch.linalg.svdvals(sanitize(inner))
    sine = torch.linalg.svdvals(triangle).flip(-1)
    angles = torch.atan2(sine, cosine)
    finite = torch.isfinite(inner).all(dim=-1).all(dim=-1, keepdim=True)
    return torch.where(finite, angles, torch.full_like(angles, float("nan")))


@full_precision
def overlap(P: Tensor, Q: Tensor) -> Tensor:
    """‖PᵀQ‖_F² / min(k, l), the mean squared cosine of the principal angles, in [0, 1]; no synchronisation.

    Args:
        P: (..., n, k) orthonormal columns.
        Q: (..., n, l) orthonormal columns.

    Returns:
        (...): 1 for equal (or nested) subspaces, 0 for orthogonal ones.
    """
    P, Q = upcast(P), upcast(Q)
    return matmul(P.mT, Q.to(P.dtype)).square().sum(dim=(-2, -1)) / min(P.shape[-1], Q.shape[-1])
