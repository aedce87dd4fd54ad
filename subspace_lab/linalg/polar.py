"""Polar factors: the matrix with all singular values 1 that is nearest to a given one.

polar(A) = U Vᵀ for A = U diag(S) Vᵀ.  Directions in which A is zero stay zero (a partial isometry): LAPACK would put
vectors of its own choice there.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision, matmul, normalize, upcast
from subspace_lab.linalg.thin_svd import negligible, significant, thin_svd

_CUSHION = 0.05  # below this, the scaling assumes that the smallest singular value is this large: see `_scalings`
_DONE = 1e-9


@full_precision
def polar(A: Tensor, *, method: Literal["auto", "svd", "iterate"] = "auto") -> Tensor:
    """Polar factor (..., m, n) of A (..., m, n), in float32 (float64 if A is).

    Args:
        A: any shape; a matrix with NaN or infinities counts as zero.
        method: svd: thin SVDs; singular values up to 1e-6 of the largest count as zero (2e-15 for float64).  iterate:
            scaled Newton-Schulz iteration in float64: batched products only, no synchronisation; singular values near
            that bound (1e-10 for float64) come out between 0 and 1.  auto: svd on the CPU, where it takes a third of
            the time, iterate elsewhere.
    """
    if not A.numel():
        return upcast(A)
    if method == "iterate" or (method == "auto" and A.device.type != "cpu"):
        return _iterate(A)
    U, S, V = thin_svd(A)
    return matmul(U.mul_(significant(S).unsqueeze(-2)), V.mT)


def nuclear_norm(A: Tensor, P: Tensor) -> Tensor:
    """Sum of the singular values (...) of A (..., m, n) with polar factor P: ⟨P, A⟩."""
    return (P * A).sum(dim=-1).double().sum(dim=-1).to(P.dtype)


def polar_beside(T: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor of [T, C] where C is orthonormal already, in its two parts.

    Of C only its overlap with T moves: with the QR decomposition CᵀT = Q R, the part of C outside C Q is orthogonal to
    T, so that [T, C Q] (..., n, 2 p) is all that has to be factored.

    Args:
        T: (..., n, p).
        C: (..., n, c), orthonormal columns.

    Returns:
        (..., n, p) and (..., n, c).
    """
    p, c = T.shape[-1], C.shape[-1]
    if 2 * p >= c:
        both = polar(torch.cat([T, C], dim=-1))
        return both[..., :p], both[..., p:]
    Q = torch.linalg.qr(matmul(C.mT, T)).Q
    inside = matmul(C, Q)
    both = polar(torch.cat([T, inside], dim=-1))
    # Where T lies nearly in the span of C, rounding in CᵀT has been magnified: what it put outside C Q goes again.
    coordinates = matmul(C.mT, both)
    both = both - matmul(C, coordinates - matmul(Q, matmul(Q.mT, coordinates)))
    return both[..., :p], C + matmul(both[..., p:] - inside, Q.mT)


def _iterate(A: Tensor) -> Tensor:
    """X <- α X (3 I − α² XᵀX) / 2 with α so that small singular values grow fastest, then α = 1.

    Chen & Chow, "A stable scaling of Newton-Schulz for improving the sign function computation of a Hermitian matrix",
    2014, for the polar factor.  Each step multiplies small singular values by 2.5; the last ones are quadratic.  The
    number of steps follows from the smallest singular value that is to reach 1, so nothing has to be asked on the way.
    """
    if A.shape[-2] < A.shape[-1]:
        return _iterate(A.mT).mT
    dtype = upcast(A).dtype
    X, _ = normalize(A.double())
    G = X.mT @ X
    # ‖XᵀX‖_F^(1/2) is at least the largest singular value, and at most n^(1/4) times it.
    bound = G.norm(dim=(-2, -1), keepdim=True)
    bound = torch.where(bound > 0, bound, 1.0)
    X, G = X / bound.sqrt(), G / bound
    smallest = max(negligible(dtype), 1e-10) * A.shape[-1] ** -0.25
    for index, scale in enumerate(_scalings(smallest)):
        if index:
            G = X.mT @ X
        X = 1.5 * scale * X - 0.5 * scale**3 * (X @ G)
    # Rounding noise of low-rank matrices has been lifted on the way, up to a tenth: x³ (5 − 3 x²) / 2 sends it to 0.
    for _ in range(2):
        G = X.mT @ X
        X = X @ (2.5 * G - 1.5 * (G @ G))
    return X.to(dtype)


@cache
def _scalings(smallest: float) -> tuple[float, ...]:
    """α of every step from singular values in [smallest, 1] to [1 − 1e-9, 1].

    With l the smallest one, α² = 3 / (1 + l + l²) maps l and 1 to the same value: the best for cubic steps.  For l
    near 0 it would send 1 to nearly 0, and with it the accuracy of the leading directions; the cushion keeps them.
    """
    found, low = [], smallest
    while 1 - low > _DONE:
        level = max(low, _CUSHION)
        scale = math.sqrt(3 / (1 + level + level**2))
        found.append(scale)
        low = min(0.5 * scale * x * (3 - (scale * x) ** 2) for x in (low, 1.0))
    return tuple(found)
