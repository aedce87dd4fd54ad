"""The two primitives of every subspace method: the span of a basis, and the complement of one.

Convention: the basis acts on the last dimension. A is (..., p, q), P and M are (..., q, r) with orthonormal
columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul, upcast


@full_precision
def project_span(A: Tensor, P: Tensor) -> Tensor:
    """Coordinates Z = A P (..., p, r) of A in the basis P, in the dtype of P."""
    return A.to(P.dtype) @ P


@full_precision
def lift_span(Z: Tensor, P: Tensor) -> Tensor:
    """Back from coordinates to the full space: Z Pᵀ (..., p, q), in the dtype of P."""
    return Z.to(P.dtype) @ P.mT


@full_precision
def project_complement(A: Tensor, M: Tensor, *, twice: bool = False) -> Tensor:
    """A - (A M) Mᵀ (..., p, q): the part of A orthogonal to the span of M.

    Args:
        A: (..., p, q), computed and returned in float32 unless float64.
        M: (..., q, m) with orthonormal columns; m = 0 is the identity.
        twice: repeat the projection. Once leaves a component of about eps * ‖A‖ inside the span, large
            relative to the result if A lies nearly in the span; twice is enough (Kahan; Parlett, The
            Symmetric Eigenvalue Problem, §6.9).
    """
    A = upcast(A)
    M = M.to(A.dtype)
    for _ in range(2 if twice else 1):
        A = A - matmul(matmul(A, M), M.mT)
    return A


@full_precision
def extend_basis(M: Tensor, new: Tensor) -> Tensor:
    """Orthonormal basis of span(M) + span(new) that begins with the columns of M, unchanged.

    Column m + j is the part of ``new[..., j]`` orthogonal to everything before it (two-pass Gram-Schmidt); if
    nothing is left, it is an arbitrary direction of the complement: the shape cannot depend on the data, so
    choose how many columns to offer, for instance with `energy_rank`.

    Args:
        M: (..., q, m) with orthonormal columns, m >= 0.
        new: (..., q, k), any columns, m + k <= q.

    Returns:
        (..., q, m + k), float32 (float64 if ``new`` is).

    Raises:
        ValueError: m + k > q.
    """
    m, k, q = M.shape[-1], new.shape[-1], new.shape[-2]
    if m + k > q:
        raise ValueError(f"cannot extend {m} by {k} orthonormal columns in dimension {q}")
    new = upcast(new)
    M = M.to(new.dtype)
    rest = project_complement(new.mT, M, twice=True).mT
    M = M.expand(*rest.shape[:-2], q, m)
    # The joint factorisation, not one of ``rest`` alone: only it keeps the completion of dependent columns
    # clear of M.
    joint = orthonormalize(torch.cat([M, rest], dim=-1))
    return torch.cat([M, joint[..., m:]], dim=-1)


def energy_rank(s: Tensor, threshold: float, *, total: Tensor | None = None) -> Tensor:
    """Smallest k with s_1² + … + s_k² >= threshold * total.

    Args:
        s: (..., n) singular values in descending order.
        threshold: fraction of the energy in [0, 1] (GPM's ε_th, eq. 5 of Saha, Garg, Roy, ICLR 2021).
        total: (...) energy to compare with, if ``s`` is truncated; default: the sum of s².

    Returns:
        int64 (...) on the device of ``s``; 0 for a zero matrix, n if the threshold is never reached.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    cumulative = s.double().square().cumsum(dim=-1)
    goal = threshold * (cumulative[..., -1:] if total is None else total.double().unsqueeze(-1))
    before = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative[..., :-1]], dim=-1)
    return (before < goal).sum(dim=-1)
