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

from subspace_lab.linalg.precision import full_precision, largest_entry, matmul, normalize, subtract_product, upcast
from subspace_lab.linalg.thin_svd import double_product, gram_eigen, lapack_svd, negligible, significant

_CUSHION = 0.05  # below this, the scaling assumes that the smallest singular value is this large: see `_scalings`
_DONE = 1e-9


Method = Literal["auto", "svd", "iterate"]


def polar(A: Tensor, *, method: Method = "auto", overwrite: bool = False) -> Tensor:
    """Polar factor (..., m, n) of A (..., m, n), in float32 (float64 if A is).

    Args:
        A: any shape; a matrix with NaN or infinities counts as zero.
        method: svd: thin SVDs, or A (AᵀA)^(-1/2) in float64 where `gram_eigen` finds it good enough; singular
            values up to 1e-6 of the largest count as zero (2e-15 for float64).  iterate:
            scaled Newton-Schulz iteration in float64: batched products only, no synchronisation; singular values near
            that bound (1e-10 for float64) come out between 0 and 1.  auto: svd on the CPU, where it takes a third of
            the time, iterate elsewhere.
        overwrite: A is not needed any more; its place may be taken.
    """
    return polar_and_norm(A, method=method, overwrite=overwrite)[0]


@full_precision
def polar_and_norm(A: Tensor, *, method: Method = "auto", overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Polar factor (..., m, n) and sum of the singular values (...) of A (..., m, n); arguments as for `polar`."""
    if not A.numel():
        return upcast(A), upcast(A).sum(dim=(-2, -1))
    if method == "iterate" or (method == "auto" and A.device.type != "cpu"):
        P = _iterate(A)
        return P, nuclear_norm(A, P)
    P = upcast(A)
    P = P if overwrite or P is not A else A.clone()
    return P, _in_place(P)


def _in_place(A: Tensor) -> Tensor:
    """Put the polar factor in A's place, one matrix after the other; return the sum of its singular values."""
    if A.dim() > 2:
        return torch.stack([_in_place(one) for one in A])
    if A.shape[-2] < A.shape[-1]:
        return _in_place(A.mT)
    if not bool(torch.isfinite(largest_entry(A))):
        A.zero_()
    found = gram_eigen(A)
    if found is None:
        U, S, V = lapack_svd(A)
        A.copy_(matmul(U.mul_(significant(S).unsqueeze(-2)), V.mT))
        return S.sum()
    values, V = found
    W = V.mul_(values.pow(-0.25))
    double_product(A, W @ W.mT, out=A)
    return values.sqrt().sum().to(A.dtype)


def nuclear_norm(A: Tensor, P: Tensor) -> Tensor:
    """Sum of the singular values (...) of A (..., m, n) with polar factor P: ⟨P, A⟩."""
    return (P * A).sum(dim=-1).double().sum(dim=-1).to(P.dtype)


def polar_beside(A: Tensor, c: int) -> Tensor:
    """Polar factor of A = [C, T] (..., n, c + p) where C, the first c columns, is orthonormal already; in A's place.

    Of C only its overlap with T moves: with the QR decomposition CᵀT = Q R, the part of C outside C Q is orthogonal to
    T, so that [T, C Q] (..., n, 2 p) is all that has to be factored.
    """
    C, T = A[..., :c], A[..., c:]
    p = T.shape[-1]
    if 2 * p >= c:
        return polar(A, overwrite=True)
    Q = torch.linalg.qr(matmul(C.mT, T)).Q
    inside = matmul(C, Q)
    both = polar(torch.cat([T, inside], dim=-1), overwrite=True)
    # Where T lies nearly in the span of C, rounding in CᵀT has been magnified: what it put outside C Q goes again.
    coordinates = matmul(C.mT, both)
    subtract_product(both, C, coordinates - matmul(Q, matmul(Q.mT, coordinates)))
    T.copy_(both[..., :p])
    subtract_product(C, inside.sub_(both[..., p:]), Q.mT)
    return A


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
