"""Numerical ground rules shared by every kernel of this package.

Three settings outside these functions could silently ruin a basis: half-precision inputs, an active
``torch.autocast`` region, and reduced-precision fp32 matmuls (TF32 on CUDA, bf16 on CPU, both switched on by
``torch.set_float32_matmul_precision``), whose 1e-3 error is a hundred times the allowed ``‖PᵀP - I‖``. The
helpers here keep all three out without touching global state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from subspace_lab.linalg.split_rows import SplitRows

_ROWS = 512
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


def full_precision(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """Run ``function`` outside any autocast region of the CPU or the GPU."""

    @wraps(function)
    def wrapper(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapper


def upcast(A: Tensor) -> Tensor:
    """Return ``A`` in the working precision: float64 stays, every other dtype becomes float32."""
    return A if A.dtype in (torch.float32, torch.float64) else A.to(torch.float32)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` in the full precision of the inputs' dtype, whatever the global matmul setting.

    float32 products are formed in float64 where they could otherwise run in TF32 or bf16 (any CUDA tensor; on
    the CPU only if the global setting asks for it). Meant for the thin factors that carry orthonormality, not
    for products with a full gradient, where a reduced-precision product costs captured energy of order 1e-6
    at most.
    """
    if A.dtype == torch.float64 or (not A.is_cuda and torch.get_float32_matmul_precision() == "highest"):
        return A @ B
    return (A.double() @ B.double()).to(A.dtype)


def subtract_product(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A − B C (..., m, n) in A's place, from a few rows of B (..., m, k) at a time; C (..., k, n)."""
    for rows, left in zip(torch.split(A, _ROWS, dim=-2), torch.split(B, _ROWS, dim=-2), strict=True):
        rows.sub_(matmul(left, C))
    return A


def sanitize(A: Tensor) -> Tensor:
    """``A`` (..., p, q) with every matrix that holds a NaN or an infinity replaced by zeros; no sync.

    LAPACK raises or does not return on such input, and one bad matrix would take its whole batch down.
    Callers that need to know which matrices were replaced test ``torch.isfinite(A).all(-1).all(-1)``
    themselves, on the device.
    """
    finite = torch.isfinite(A).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    return torch.where(finite, A, torch.zeros_like(A))


def normalize(A: Tensor, rows: SplitRows | None = None) -> tuple[Tensor, Tensor]:
    """Upcast, sanitize, and scale each matrix to largest entry 1: its Gram matrix cannot over/underflow.

    Args:
        A: (..., p, q).
        rows: the processes among which p is split.

    Returns:
        The scaled matrices (..., p, q) and the scale (..., 1, 1) to multiply back; the scale of a zero matrix
        is 0.
    """
    A = upcast(A)
    largest = largest_entry(A, rows)
    finite = torch.isfinite(largest)
    scale = torch.where(finite, largest, torch.zeros_like(largest))
    # Two steps: 1 / scale overflows for subnormal scales, A / scale does not.
    return torch.where(finite, A, 0.0) / torch.where(scale > 0, scale, torch.ones_like(scale)), scale


def largest_entry(A: Tensor, rows: SplitRows | None = None) -> Tensor:
    """Largest |A_ij| of each matrix, (..., 1, 1); NaN or inf where the matrix holds one; no temporary.

    (The infinity norm of torch is the same number, twenty times slower on a CPU.)
    """
    if not A.shape[-2]:  # a process may have no row of a short matrix
        mine = A.new_zeros(*A.shape[:-2], 1, 1)
    else:
        mine = torch.maximum(A.amax(dim=(-2, -1), keepdim=True), -A.amin(dim=(-2, -1), keepdim=True))
    return mine if rows is None else rows.largest(mine)
