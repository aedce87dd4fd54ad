"""Thin singular value decompositions of weights: in the orientation that is cheap, and never without an answer.

LAPACK takes twice the time for a wide matrix that it takes for its transpose, and its float32 divide and conquer gives
up on some matrices with hundreds of equal singular values (concatenated bases have them).  Here matrices are always
tall, a float32 failure is repeated in float64, and a failure of that answered from the Gram matrix; every such step is
logged and counted in `fallbacks`.

All functions take A (..., m, n), batched, and return U (..., m, k), S (..., k) descending and V (..., n, k), in float32
(float64 if A is) and on A's device.  A matrix with NaN or infinities has the factors of the zero matrix and S = NaN.
"""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

import torch
from torch import Tensor

from subspace_lab.linalg.leading_eigh import leading_eigh
from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, largest_entry, matmul, sanitize, upcast
from subspace_lab.linalg.svd import descending_eigh

Factors = tuple[Tensor, Tensor, Tensor]

_LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_log = logging.getLogger(__name__)
_counts: Counter[str] = Counter()
_lock = Lock()

_TALL = 2  # from m = 2 n on, the float64 Gram matrix takes 3/4 of the time of a float32 SVD on a CPU
_LARGE = 1536  # and here at any shape: as fast as the SVD, in 5/8 of its memory
_ROWS = 256  # converted to float64 at once
_BLOCK = 192  # columns of a Gram matrix that are formed together
_OVERSAMPLE = 8


def fallbacks() -> dict[str, int]:
    """How often, in this process, a float32 SVD was repeated in `float64`, and that replaced by the `gram` matrix."""
    with _lock:
        return {"float64": _counts["float64"], "gram": _counts["gram"]}


def negligible(dtype: torch.dtype) -> float:
    """Singular values below this share of the largest one are rounding noise: their vectors mean nothing."""
    return 10 * torch.finfo(dtype).eps


def significant(S: Tensor) -> Tensor:
    """Which of the singular values S (..., r), descending, are more than rounding noise."""
    return torch.gt(S, negligible(S.dtype) * S[..., :1])


@full_precision
def thin_svd(A: Tensor, k: int | None = None) -> Factors:
    """A = U diag(S) Vᵀ, or its k leading triplets; U and V have orthonormal columns, whatever A's rank.

    Tall matrices of moderate condition go through their Gram matrix (`gram_eigen`); everything else through LAPACK or
    cuSOLVER.  Synchronises.

    Args:
        A: (..., m, n).
        k: how many triplets, up to min(m, n); default: all.
    """
    if A.shape[-2] < A.shape[-1]:
        V, S, U = thin_svd(A.mT, k)
        return U, S, V
    A, finite = _finite(A)
    found = gram_eigen(A)
    U, S, V = lapack_svd(A) if found is None else _lifted(A, *found)
    return U[..., :k], torch.where(finite, S, float("nan"))[..., :k], V[..., :k]


@full_precision
def top_k(A: Tensor, k: int, *, approximate: bool = False) -> Factors:
    """The k leading triplets where k is a fraction of min(m, n): from the eigenvectors of the smaller Gram matrix.

    Columns whose singular value is rounding noise are zero, and so is their S: they carry nothing.

    Args:
        A: (..., m, n).
        k: up to min(m, n); above half of it, and for float64, `thin_svd` answers.
        approximate: Gram matrix and eigenvectors in float32 instead of float64, then one Rayleigh-Ritz pass with A:
            half the time, up to a quarter of min(m, n).  Singular values agree to 1e-5,
            vectors as far as the spectrum tells them apart; a truncation
            inside a flat part of it may come out differently (sums of truncated matrices: below 1e-3 relative).
    """
    if A.shape[-2] < A.shape[-1]:
        V, S, U = top_k(A.mT, k, approximate=approximate)
        return U, S, V
    if A.dtype == torch.float64 or 2 * k > A.shape[-1]:
        U, S, V = thin_svd(A, k)
    else:
        A, finite = _finite(A)
        approximate = approximate and 4 * k <= A.shape[-1]
        U, S, V = _ritz(A, k) if approximate else _lifted(A, *leading_eigh(double_gram(A), k, overwrite=True))
        S = torch.where(finite, S, float("nan"))
    kept = significant(S).unsqueeze(-2)
    # Not a product: 0 · NaN is NaN, and U and V are finite where S is not.
    return U * kept, torch.where(kept[..., 0, :] | S.isnan(), S, 0.0), V * kept


def _finite(A: Tensor) -> tuple[Tensor, Tensor]:
    """A in its working precision, zeros for matrices with NaN or infinities, and which (..., 1) had none."""
    A = upcast(A)
    if not A.numel():
        return A, torch.ones(*A.shape[:-2], 1, dtype=torch.bool, device=A.device)
    finite = torch.isfinite(largest_entry(A))
    return (A if bool(finite.all()) else sanitize(A)), finite[..., 0]


def gram_eigen(A: Tensor, condition: float = 3e4) -> tuple[Tensor, Tensor] | None:
    """σ² (..., n), descending, and V (..., n, n) in float64 from AᵀA, where that is worth its while and good enough.

    Args:
        A: (..., m, n) with m >= n, finite.
        condition: largest σ_max / σ_min.  Up to 3e4 the triplets are as good as a float32 SVD's.

    Returns:
        None for float64, for short matrices on a CPU, where the SVD is faster, and if one of them is conditioned worse.
    """
    m, n = A.shape[-2:]
    if A.dtype != torch.float32 or not A.numel() or not (A.is_cuda or m >= _TALL * n or n >= _LARGE):
        return None
    G = double_gram(A)
    if not A.is_cuda:  # 1/15 of the work, and sees most of those that are no good: σ_min is below any pivot
        pivots = torch.linalg.cholesky_ex(G).L.diagonal(dim1=-2, dim2=-1)
        if not bool((condition * pivots.amin(dim=-1) > pivots.amax(dim=-1)).all()):
            return None
    values, V = leading_eigh(G, n, overwrite=True)
    if bool((values[..., -1] * condition**2 <= values[..., 0]).any()):
        return None
    return values, V


def _lifted(A: Tensor, values: Tensor, V: Tensor) -> Factors:
    """Triplets of A from the leading eigenvalues and -vectors (overwritten) of AᵀA: right down to σ = 1e-6 σ_max."""
    S, right = values.sqrt(), V.to(A.dtype)
    return double_product(A, V.div_(torch.where(S > 0, S, 1.0).unsqueeze(-2))), S.to(A.dtype), right


def _ritz(A: Tensor, k: int) -> Factors:
    """Eigenvectors in float32, a few more than asked for; then the best triplets inside the span of A V."""
    width = min(k + _OVERSAMPLE, A.shape[-1])
    largest = largest_entry(A)
    scale = torch.where(largest > 0, largest, 1.0)  # float32's squares have half its range
    _, vectors = leading_eigh(_gram(A, A.dtype, scale), width, overwrite=True)
    Q = orthonormalize(matmul(A, vectors) / scale)
    B = matmul(A.mT, Q).double() / scale
    values, W = descending_eigh(B.mT @ B)
    W, S = W[..., :k], values[..., :k].sqrt()
    V = (B @ W) / torch.where(S > 0, S, 1.0).unsqueeze(-2)
    return matmul(Q, W.to(A.dtype)), S.to(A.dtype) * scale[..., 0], V.to(A.dtype)


def double_gram(A: Tensor) -> Tensor:
    """AᵀA (..., n, n) in float64, from a few rows at a time: A (..., m, n) is never converted as a whole."""
    return _gram(A, torch.float64)


def _gram(A: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    n = A.shape[-1]
    G = torch.zeros(*A.shape[:-2], n, n, dtype=dtype, device=A.device)
    # On a CPU, where products are what takes time, the upper triangle is not computed: it mirrors the lower one.
    width = n if A.is_cuda or n < 2 * _BLOCK else _BLOCK
    for rows in torch.split(A, _ROWS, dim=-2):
        wide = rows.to(dtype) if scale is None else rows / scale
        for start in range(0, n, width):
            end = start + width
            G[..., start:, start:end] += matmul(wide[..., start:].mT, wide[..., start:end])
    for start in range(0, n, width):
        G[..., start : start + width, start + width :] = G[..., start + width :, start : start + width].mT
    return G


def double_product(A: Tensor, X: Tensor, out: Tensor | None = None) -> Tensor:
    """A X (..., m, k) in A's dtype, summed in float64 and rounded once; X (..., n, k) is float64; `out` may be A."""
    out = A.new_empty(*A.shape[:-1], X.shape[-1]) if out is None else out
    for rows, part in zip(torch.split(A, _ROWS, dim=-2), torch.split(out, _ROWS, dim=-2), strict=True):
        part.copy_(rows.double() @ X)
    return out


def lapack_svd(A: Tensor) -> Factors:
    """Thin SVD of tall A in its own precision, with everything that can be done where it fails."""
    try:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return U, S, Vh.mT
    except _LinAlgError:
        if A.dim() > 2:  # only some of the batch may have failed
            found = [lapack_svd(matrix) for matrix in A.flatten(0, -3)]
            U, S, V = (torch.stack(parts) for parts in zip(*found, strict=True))
            batch = A.shape[:-2]
            return U.view(*batch, *U.shape[1:]), S.view(*batch, -1), V.reshape(*batch, *V.shape[1:])
    if A.dtype == torch.float32:
        _count("float64", A)
        U, S, V = lapack_svd(A.double())
        return U.to(A.dtype), S.to(A.dtype), V.to(A.dtype)
    _count("gram", A)
    return gram_factors(A)


def gram_factors(A: Tensor) -> Factors:
    """Thin SVD of tall A (..., m, n) without LAPACK's: eigenvectors V of AᵀA, then U R = A V with R nearly diagonal.

    In order of length, so that QR sweeps the error of short columns out instead of magnifying it; a second round, with
    the Gram matrix of A V, takes care of what squaring lost.  Directions below 1e-8 σ_max are orthonormal, not sorted.
    """
    V = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device).expand(*A.shape[:-2], -1, -1)
    Z = A.double()
    for _ in range(2):
        _, W = descending_eigh(Z.mT @ Z)
        V, Z = V @ W, Z @ W
    V = orthonormalize(V)
    Z = A.double() @ V
    U = orthonormalize(Z)
    S = (U * Z).sum(dim=-2).clamp_min(0)
    return U.to(A.dtype), S.to(A.dtype), V.to(A.dtype)


def _count(step: str, A: Tensor) -> None:
    with _lock:
        _counts[step] += 1
    _log.warning("the %s SVD of a %d x %d matrix did not converge; falling back to %s", A.dtype, *A.shape[-2:], step)
