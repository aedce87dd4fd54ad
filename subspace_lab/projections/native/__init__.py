"""Compiled kernels, all optional: C for float32 on the CPU, Triton for CUDA. The torch forms have the same bits.

A function writes its result and returns True, or returns False and has done nothing: no compiler, SUBSPACE_NATIVE=0,
another dtype or device, memory that is not contiguous. The caller then takes its torch form. Kernels are tried against
the definition before they are used; nothing is stored between calls, signs and permutations are made again each time.

`rows` is (start, stop) of the D rows; base, out and g have stop - start entries. `c` is rounded to float32.
"""

from __future__ import annotations

import os

from torch import Tensor

from subspace_lab.projections.native import cpu

__all__ = ["fwht_", "orthoblock_lift", "orthoblock_project", "sign_lift", "sign_project"]

Keys = tuple[int, int, int]
Rows = tuple[int, int] | None


def orthoblock_lift(
    z: Tensor, base: Tensor | None, out: Tensor, D: int, n: int, keys: Keys, c: float, rows: Rows = None
) -> bool:
    """Set out to base + c P[rows] z, P orthoblock with blocks of n >= d; z (d,); keys of B, S and the permutations."""
    if _on_gpu(z, out):
        from subspace_lab.projections.native import gpu

        return gpu.orthoblock_lift(z, base, out, n, keys, c, rows or (0, D))
    return cpu.orthoblock_lift(z, base, out, n, keys, c, rows or (0, D))


def orthoblock_project(g: Tensor, out: Tensor, D: int, n: int, keys: Keys, c: float, rows: Rows = None) -> bool:
    """Set out (d,) to c P[rows]ᵀ g. Blocks are added in ascending order, so the number of threads does not matter."""
    if _on_gpu(g, out):
        from subspace_lab.projections.native import gpu

        return gpu.orthoblock_project(g, out, n, keys, c, rows or (0, D))
    return cpu.orthoblock_project(g, out, n, keys, c, rows or (0, D))


def fwht_(x: Tensor, n: int) -> bool:
    """In place, H of every row of x (K, n): unnormalised, n a power of two, strides 1, 2, 4, …."""
    return cpu.fwht_(x, n)


def sign_lift(z: Tensor, base: Tensor | None, out: Tensor, D: int, key: int, c: float, rows: Rows = None) -> bool:
    """Set out to base + c A[rows] z, A the signs of `dense`. A row's sum is always taken in the same order."""
    return cpu.sign_lift(z, base, out, key, c, rows or (0, D))


def sign_project(g: Tensor, out: Tensor, D: int, key: int, c: float, rows: Rows = None) -> bool:
    """Set out to c A[rows]ᵀ g. Partial sums are of fixed pieces of the rows: threads do not matter."""
    return cpu.sign_project(g, out, key, c, rows or (0, D))


def _on_gpu(*tensors: Tensor) -> bool:
    return all(t.is_cuda for t in tensors) and os.environ.get("SUBSPACE_NATIVE") != "0"
