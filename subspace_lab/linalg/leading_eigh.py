"""The leading eigenvectors of a symmetric matrix, without the others.

torch has no partial eigenproblem.  LAPACK's `syevr` finds the leading eighth of 768 eigenvectors in half the time of
all of them; scipy brings it along, but its Python wrapper holds the interpreter's lock, and threads that merge
different matrices would wait for each other.  It is therefore called where scipy exports it for compiled code.  It also
needs little memory: one matrix for the vectors, where torch's `eigh` takes three besides G.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock, current_thread, main_thread
from typing import Any

import torch
from torch import Tensor

from subspace_lab.linalg.svd import descending_eigh

_FEWEST = 128  # below this size there is nothing to save
_SHARE = 4  # and where more than a quarter of the vectors is wanted, little
_LARGE = 1024  # from here on memory counts

_lock = Lock()
_inside = 0
_limits: Any = None


def leading_eigh(G: Tensor, k: int, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (..., k), descending and clamped at 0, and eigenvectors (..., n, k) of G (..., n, n).

    Args:
        G: symmetric positive semi-definite, finite, float32 or float64.
        k: how many.
        overwrite: G is contiguous and not needed any more; the vectors may take its place.
    """
    n = G.shape[-1]
    few = _SHARE * k <= n
    # Two threads that look for all vectors at once take ten times as long.
    frugal = overwrite and n >= _LARGE and current_thread() is main_thread()
    if G.device.type != "cpu" or n < _FEWEST or not (few or frugal) or (routine := _syevr(G.dtype)) is None:
        values, vectors = descending_eigh(G)
        return values[..., :k], vectors[..., :k]
    A = G if overwrite else G.clone(memory_format=torch.contiguous_format)
    wanted = k if few else n  # finding all of them is faster than looking for many
    with _one_thread():
        values = torch.stack([_partial(routine, matrix, wanted) for matrix in A.view(-1, n, n)])
    return values.view(*G.shape[:-2], wanted)[..., :k], A[..., :k, :].mT


def _partial(routine: Callable[..., None], A: Tensor, k: int) -> Tensor:
    """LAPACK's syevr for one contiguous matrix, whose first k rows become the vectors; returns the values.

    Everything is passed by address, and nothing is kept.
    """
    n = len(A)
    Z, diagonal = A.new_zeros(k, n), A.diagonal().clone()  # rows are columns to LAPACK
    w, found = A.new_zeros(n), ctypes.c_int()
    work, iwork = A.new_empty(64 * n), torch.empty(16 * n, dtype=torch.int32)
    support, info = torch.empty(2 * n, dtype=torch.int32), ctypes.c_int()
    real = ctypes.c_double if A.dtype == torch.float64 else ctypes.c_float

    def integer(value: int) -> Any:
        return ctypes.byref(ctypes.c_int(value))

    none = ctypes.byref(real(0.0))
    routine(
        *(b"V", b"I", b"L", integer(n), A.data_ptr(), integer(n)),
        *(none, none, integer(n - k + 1), integer(n), none),
        *(ctypes.byref(found), w.data_ptr(), Z.data_ptr(), integer(n), support.data_ptr()),
        *(work.data_ptr(), integer(len(work)), iwork.data_ptr(), integer(len(iwork)), ctypes.byref(info)),
    )
    if info.value or found.value != k:  # inverse iteration did not converge
        del Z
        below = A.tril(-1)  # LAPACK's other triangle: only this one and the diagonal were written to
        values, vectors = descending_eigh(below.add_(below.mT.clone()).diagonal_scatter(diagonal))
        A[:k] = vectors[:, :k].mT
        return values[:k]
    for start in range(0, k, _FEWEST):
        rows = Z[start : start + _FEWEST]
        A[k - start - len(rows) : k - start] = rows.flip(0)
    return w[:k].flip(0).clamp_min(0)


@cache
def _syevr(dtype: torch.dtype) -> Callable[..., None] | None:
    """The routine for compiled code; a call through ctypes lets other threads run."""
    try:
        from scipy.linalg import cython_lapack  # type: ignore[import-untyped]

        capsule = cython_lapack.__pyx_capi__["dsyevr" if dtype == torch.float64 else "ssyevr"]
    except (ImportError, AttributeError, KeyError):
        return None
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, name(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 21)(address)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The BLAS of scipy has threads of its own, which beside torch's take a hundred times as long as one."""
    global _inside, _limits
    with _lock:
        _inside += 1
        if _inside == 1:
            _limits = _controller().limit(limits=1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _limits.restore_original_limits()


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    # torch's MKL is left alone: giving it its threads back would give them to threads that are to have one.
    return ThreadpoolController().select(internal_api="openblas")
