"""Orthonormal columns for a given span, for any input a training run can produce."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from subspace_lab.linalg.precision import upcast
from subspace_lab.linalg.random import uniform

_FILL_KEY = 0x5EED


def orthonormalize(Y: Tensor, *, method: Literal["auto", "qr", "cholesky"] = "auto") -> Tensor:
    """Orthonormal basis Q of the columns of Y: the Q factor of the QR decomposition with diag(R) > 0.

    Because R is upper triangular, the first j columns of Q span the first j columns of Y for every j, and the
    positive diagonal makes Q unique and continuous in Y (no sign flips). Directions that Y does not determine
    (zero, dependent or negligible columns) are filled with an arbitrary but deterministic orthonormal
    completion, so ‖QᵀQ - I‖ <= 1e-5 in float32 for every finite Y, the zero matrix included.

    Args:
        Y: (..., n, k) with k <= n. float64 stays, other dtypes are computed and returned in float32.
        method: ``qr`` is Householder QR (LAPACK, cuSOLVER). ``cholesky`` is shifted Cholesky QR (Fukaya,
            Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for computing the QR factorization
            of ill-conditioned matrices", SISC 2020): batched matrix products only and no host
            synchronisation. ``auto`` is ``qr`` on the CPU (2 to 4 times faster there) and ``cholesky``
            elsewhere.

    Returns:
        (..., n, k). A matrix with NaN or infinite entries gives unspecified values (possibly NaN) and raises
        nothing.

    Raises:
        ValueError: k > n, or an unknown method.
    """
    if Y.shape[-1] > Y.shape[-2]:
        raise ValueError(f"cannot give {Y.shape[-1]} orthonormal columns of length {Y.shape[-2]}")
    if method not in ("auto", "qr", "cholesky"):
        raise ValueError(f"unknown method {method!r}, expected auto, qr or cholesky")
    Y = upcast(Y)
    if Y.numel() == 0:
        return Y
    # Column lengths do not change Q, and now nothing overflows in either route.
    Y = Y / _positive(Y.abs().amax(dim=-2, keepdim=True))
    if method == "qr" or (method == "auto" and Y.device.type == "cpu"):
        return _householder(Y)
    return _cholesky(Y)


def _householder(Y: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(Y)
    signs: Tensor = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    oriented: Tensor = Q * signs.unsqueeze(-2)
    return oriented


def _cholesky(Y: Tensor) -> Tensor:
    """Shifted Cholesky QR in float64.

    Each column is scaled to length 1 (removes bad scaling, which no Gram matrix survives) and gets a fixed
    random pattern of the size of the input's own rounding error, so that a rank-deficient matrix has *some*
    direction in every column that later passes can enlarge; a zero column becomes the pattern. One pass maps
    a singular value x to x / sqrt(x² + shift): everything above sqrt(shift) ≈ 1e-6 goes to one and the rest
    grows by 1e6.
    """
    n, k = Y.shape[-2:]
    X = Y.double()
    norm = X.norm(dim=-2, keepdim=True)
    # Not signs: a small square matrix of signs is singular every other time.
    fill = (uniform((n, k), key=_FILL_KEY, dtype=torch.float64, device=Y.device) - 0.5) * (12 / n) ** 0.5
    noise = 4 * torch.finfo(Y.dtype).eps
    X = torch.where(norm > 0, X / _positive(norm) + noise * fill, fill)
    identity = torch.eye(k, dtype=torch.float64, device=Y.device)
    shift = 8 * k * torch.finfo(torch.float64).eps
    # float32 input: the smallest singular value is >= ~1e-9 after the fill, so two shifted passes reach
    # condition ~1 and the third removes what the shift left. float64 starts at ~1e-17 and needs two more.
    passes = 3 if Y.dtype == torch.float32 else 5
    for index in range(passes):
        amount = shift if index < passes - 1 else 0.0
        factor, _ = torch.linalg.cholesky_ex(X.mT @ X + amount * identity, check_errors=False)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        X = X @ inverse.mT
    return X.to(Y.dtype)


def _positive(x: Tensor) -> Tensor:
    """``x`` with zeros replaced by one: a safe divisor."""
    return torch.where(x > 0, x, torch.ones_like(x))
