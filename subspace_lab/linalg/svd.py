"""Bases of the dominant right singular space: exact, by the Gram matrix, randomised, warm-started.

Every function takes A (..., p, q) and returns ``(P, s)``: P (..., q, r) with orthonormal columns ordered by
singular value, s (..., r) the singular values or estimates of them, descending. If A has fewer than r
singular values (p < r <= q) or rank below r, the remaining columns of P are an orthonormal completion with
s = 0 (or rounding noise).

Input: float64 stays, other dtypes are computed and returned in float32. Any scale is fine. A matrix with NaN
or infinite entries is treated as the zero matrix, so that nothing raises and its neighbours in the batch are
unaffected; the caller masks it. r > q raises ValueError.

torch.linalg.eigh and svd check LAPACK's status, which is one host synchronisation per call on CUDA. All
functions here call one of them (`subspace_iteration` only with ``rayleigh_ritz=True``): they belong in a
refresh, not in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul, normalize, upcast
from subspace_lab.linalg.random import Key, rademacher
from subspace_lab.linalg.split_rows import SplitRows, orthonormal_columns, total

_LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def _check_rank(A: Tensor, r: int) -> None:
    if not 1 <= r <= A.shape[-1]:
        raise ValueError(f"rank must be between 1 and the last dimension {A.shape[-1]}, got {r}")


def descending_eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped at 0) and eigenvectors of symmetric positive semi-definite G."""
    try:
        values, vectors = torch.linalg.eigh(G)
    except _LinAlgError:
        # LAPACK gives up very rarely, and then because of the rounding pattern: other precision, other
        # pattern.
        values, vectors = (x.to(G.dtype) for x in torch.linalg.eigh(G.double()))
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _complete(P: Tensor, s: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Pad P (..., q, m) and s (..., m) to r columns; the new ones are orthonormal to the old, with s = 0."""
    missing = r - P.shape[-1]
    if missing <= 0:
        return P, s
    return orthonormalize(pad(P, (0, missing))), pad(s, (0, missing))


def _lift_left(A: Tensor, U: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors V = AᵀU / s from left ones U (..., p, m), completed to r columns.

    Dividing by s would magnify the rounding error of small singular values; QR in order of s sweeps it out
    instead.
    """
    Z = A.mT @ U
    return orthonormalize(pad(Z, (0, r - Z.shape[-1]))), pad(Z.norm(dim=-2), (0, r - Z.shape[-1]))


@full_precision
def truncated_svd(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Exact truncated SVD by torch.linalg.svd: the reference for the others, and the slowest.

    If LAPACK's divide and conquer does not converge, `gram_eigh` answers instead.
    """
    _check_rank(A, r)
    scaled, scale = normalize(A)
    try:
        _, s, Vh = torch.linalg.svd(scaled, full_matrices=False)
    except _LinAlgError:
        return gram_eigh(A, r)
    P, s = _complete(Vh[..., :r, :].mT.contiguous(), s[..., :r], r)
    return P, s * scale[..., 0]


@full_precision
def gram_eigh(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the smaller Gram matrix: of AᵀA if p >= q, else of AAᵀ, lifted by Aᵀ.

    Captured energy equals the exact SVD's to rounding. Squaring loses singular values below sqrt(eps) s_1
    (3e-4 in float32): those directions are orthonormal but in arbitrary order.
    """
    _check_rank(A, r)
    scaled, scale = normalize(A)
    if A.shape[-2] >= A.shape[-1]:
        values, vectors = descending_eigh(matmul(scaled.mT, scaled))
        P, s = vectors[..., :r].contiguous(), values[..., :r].sqrt()
    else:
        _, U = descending_eigh(matmul(scaled, scaled.mT))
        P, s = _lift_left(scaled, U[..., :r], r)
    return P, s * scale[..., 0]


@full_precision
def randomized_svd(
    A: Tensor, r: int, *, key: Key, oversample: int = 8, power_iterations: int = 1, rows: SplitRows | None = None
) -> tuple[Tensor, Tensor]:
    """Randomised range finder with power iterations.

    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011, algorithms 4.4 and 5.1.

    Args:
        A: (..., p, q).
        r: rank, 1 <= r <= q.
        key: of the ±1 test matrix (q, r + oversample); it is the same on CPU and GPU. A tensor of keys must
            have the batch shape of A; an integer key uses one test matrix for the whole batch.
        oversample: extra sketch columns.
        power_iterations: each costs two more products with A and sharpens the spectrum to its next odd power.
        rows: the processes among which p is split; they send factors of width r + oversample only.
    """
    _check_rank(A, r)
    scaled, scale = normalize(A, rows)
    p, q = A.shape[-2:]
    width = min(r + oversample, q) if rows is not None else min(r + oversample, p, q)
    test = rademacher((q, width), key=key, dtype=scaled.dtype, device=A.device)

    def across(Y: Tensor, *, last: bool) -> Tensor:
        return orthonormalize(Y) if rows is None else orthonormal_columns(Y, rows, passes=2 if last else 1)

    Q = across(scaled @ test, last=power_iterations == 0)
    for left in reversed(range(power_iterations)):
        Q = across(scaled @ orthonormalize(total(scaled.mT @ Q, rows)), last=left == 0)
    Z = total(scaled.mT @ Q, rows).double()
    # SVD of the small factor Zᵀ = QᵀA by its Gram matrix, in float64: k x k only, and it keeps s down to 1e-7
    # s_1 apart.
    _, W = descending_eigh(Z.mT @ Z)
    P, s = _lift_left(Z.mT.to(scaled.dtype), W[..., :r].to(scaled.dtype), r)
    return P, s * scale[..., 0]


@full_precision
def subspace_iteration(
    A: Tensor, P: Tensor, *, iterations: int = 1, rayleigh_ritz: bool = True, rows: SplitRows | None = None
) -> tuple[Tensor, Tensor]:
    """Block power iteration on AᵀA from a previous basis (Golub, Van Loan, Matrix Computations, §8.2.4).

    Rayleigh-Ritz comes first in every iteration: rotating A P by the eigenvectors of its Gram matrix puts it in
    singular-vector order (elementwise optimizers such as Adam depend on the basis, not only on its span) and makes
    its columns orthogonal, so that directions with small singular values do not drown in the second product and
    no tall orthonormalisation is needed at the half step; the QR decomposition keeps the order.

    Args:
        A: (..., p, q). A zero (or non-finite) matrix says nothing: its old basis is returned.
        P: (..., q, r) previous basis with orthonormal columns.
        iterations: each costs two products with A and an r x r eigenproblem.
        rayleigh_ritz: if False, nothing synchronises; the half step is orthonormalised instead and columns keep
            the order of the old basis.
        rows: the processes among which p is split (p is theirs together then, and should be at least r).

    Returns:
        P (..., q, r) and estimates s (..., r) of the singular values, unordered without Rayleigh-Ritz. With
        p < r the span of A is smaller than the basis: then `gram_eigh` answers (which synchronises, whatever
        ``rayleigh_ritz`` says).
    """
    r = P.shape[-1]
    _check_rank(A, r)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    A = upcast(A)
    old = P.to(A.dtype)
    if A.shape[-2] < r and rows is None:
        new, s = gram_eigh(A, r)
        return torch.where(s[..., :1, None] > 0, new, old), s
    new = old
    for _ in range(iterations):
        Z = total(A.mT @ _half_step(A, A @ new, rayleigh_ritz, rows), rows)
        Z, scale = normalize(Z)
        s = Z.norm(dim=-2) * scale[..., 0]
        new = orthonormalize(Z)
    # Only the thin products were looked at: passes over A itself would cost as much as a product. What is zero or
    # not finite in A has made them so, and `normalize` has given it scale 0.
    return torch.where(scale > 0, new, old), s


def _half_step(A: Tensor, Y: Tensor, rayleigh_ritz: bool, rows: SplitRows | None) -> Tensor:
    """Orthonormal columns for Y = A P (..., p, r): its left singular vectors, longest first, or in the columns' order.

    Columns that Y leaves open are taken from A itself, so that an iteration started in the wrong place still
    finds A's range.
    """
    scaled, scale = normalize(Y, rows)
    if not rayleigh_ritz:
        return orthonormalize(scaled) if rows is None else orthonormal_columns(scaled, rows)
    _, W = descending_eigh(total(matmul(scaled.mT, scaled), rows))
    rotated = matmul(scaled, W)
    length = rotated.norm(dim=-2, keepdim=True)
    if rows is not None:
        length = rows.total(length.square()).sqrt()
    known = length > torch.finfo(Y.dtype).eps * length.amax(dim=-1, keepdim=True)
    spread = A[..., :: A.shape[-1] // Y.shape[-1]][..., : Y.shape[-1]] / torch.where(scale > 0, scale, 1.0)
    return torch.where(known, rotated / torch.where(known, length, torch.ones_like(length)), spread)


def align_signs(P: Tensor, P_old: Tensor) -> Tensor:
    """Flip the columns of P (..., q, r) so that diag(P_oldᵀ P) >= 0.

    Singular vectors have arbitrary signs; moments kept across a refresh need them to be continuous.
    """
    agreement = (P * P_old.to(P.dtype)).sum(dim=-2, keepdim=True)
    return torch.where(agreement < 0, -P, P)


@full_precision
def captured_energy(A: Tensor, P: Tensor) -> Tensor:
    """Fraction ‖A P‖_F² / ‖A‖_F² of the energy of A (..., p, q) inside the basis P (..., q, r).

    Returns:
        (...) in [0, 1] up to rounding; 0 for a zero or non-finite A. No synchronisation.
    """
    scaled, _ = normalize(A)
    total = scaled.square().sum(dim=(-2, -1))
    inside = (scaled @ upcast(P).to(scaled.dtype)).square().sum(dim=(-2, -1))
    return torch.where(total > 0, inside / torch.where(total > 0, total, torch.ones_like(total)), total)
