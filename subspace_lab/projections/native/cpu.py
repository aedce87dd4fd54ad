"""The C kernels on CPU tensors of float32, through ctypes (which lets other Python threads run meanwhile).

Each function writes its result and returns True, or declines with False: no library, or an argument of another kind.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading

import torch
from torch import Tensor

from subspace_lab.projections.native import build, check

LOG = logging.getLogger(__name__)
ROWS_PER_THREAD = 1 << 17  # fewer are done before another thread has woken up
_LOCK = threading.Lock()

_POINTER, _INT64, _INT, _FLOAT, _KEY = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_float,
    ctypes.c_uint64,
)
_ARGUMENTS = {
    "lift_f32": (_POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, _INT, _POINTER, _FLOAT, _INT),
    "project_f32": (_POINTER, _POINTER, _INT64, _INT64, _INT64, _INT, _POINTER, _FLOAT, _INT),
    "transform_f32": (_POINTER, _INT64, _INT, _INT),
    "sign_lift_f32": (_POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, _KEY, _FLOAT, _INT),
    "sign_project_f32": (_POINTER, _POINTER, _INT64, _INT64, _INT64, _KEY, _FLOAT, _INT),
}


def orthoblock_lift(
    z: Tensor, base: Tensor | None, out: Tensor, n: int, keys: tuple[int, int, int], c: float, rows: tuple[int, int]
) -> bool:
    """Set out to base + c P[rows] z; base may be out."""
    library = _ready(z, out, *(() if base is None else (base,)))
    if library is None or overlap(base, out) or overlap(z, out):
        return False
    where = None if base is None else base.data_ptr()
    failed = library.lift_f32(
        z.data_ptr(), len(z), where, out.data_ptr(), *rows, _log2(n), _keys(keys), c, _threads(len(out))
    )
    return not failed


def orthoblock_project(
    g: Tensor, out: Tensor, n: int, keys: tuple[int, int, int], c: float, rows: tuple[int, int]
) -> bool:
    """Set out to c P[rows]ᵀ g."""
    library = _ready(g, out)
    if library is None:
        return False
    failed = library.project_f32(
        g.data_ptr(), out.data_ptr(), len(out), *rows, _log2(n), _keys(keys), c, _threads(len(g))
    )
    return not failed


def fwht_(x: Tensor, n: int) -> bool:
    """Each row of x (K, n) is replaced by H times it."""
    library = _ready(x)
    if library is None:
        return False
    return not library.transform_f32(x.data_ptr(), x.numel() // n, _log2(n), _threads(x.numel()))


def sign_lift(z: Tensor, base: Tensor | None, out: Tensor, key: int, c: float, rows: tuple[int, int]) -> bool:
    """Set out to base + c A[rows] z with the signs A of `dense`; base must not be out."""
    library = _ready(z, out, *(() if base is None else (base,)))
    if library is None or overlap(base, out) or overlap(z, out) or (base is not None and _start(base) == _start(out)):
        return False
    where = None if base is None else base.data_ptr()
    threads = _threads(len(out) * max(1, len(z) // 16))
    return not library.sign_lift_f32(z.data_ptr(), len(z), where, out.data_ptr(), *rows, key, c, threads)


def sign_project(g: Tensor, out: Tensor, key: int, c: float, rows: tuple[int, int]) -> bool:
    """Set out to c A[rows]ᵀ g."""
    library = _ready(g, out)
    if library is None:
        return False
    threads = _threads(len(g) * max(1, len(out) // 16))
    return not library.sign_project_f32(g.data_ptr(), out.data_ptr(), len(out), *rows, key, c, threads)


def _ready(*tensors: Tensor) -> ctypes.CDLL | None:
    # Subclasses (fake tensors of a memory estimate, for one) have no memory to point at.
    for t in tensors:
        if t.dtype != torch.float32 or t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter):
            return None
        if not t.is_contiguous() or t.is_neg():
            return None
    if os.environ.get("SUBSPACE_NATIVE") == "0":
        return None
    with _LOCK:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build.library()
    if library is None:
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    if not _right(library):
        LOG.warning("compiled kernels disagree with their definition on this machine: projections run in torch alone")
        return None
    return library


def _right(library: ctypes.CDLL) -> bool:
    """Whether the library has the bits of the definition, on small cases that go through each of its loops."""
    keys, key, c = (5, 7, 11), 13, 0.37109375
    for n, d, D, rows in ((8, 7, 150, (3, 149)), (256, 200, 700, (100, 700))):
        z, g, base = (
            torch.arange(k, dtype=torch.float32).add_(s).sin_()
            for k, s in ((d, 1), (rows[1] - rows[0], 2), (rows[1] - rows[0], 3))
        )
        up, down = torch.empty_like(g), torch.empty_like(z)
        library.lift_f32(z.data_ptr(), d, base.data_ptr(), up.data_ptr(), *rows, _log2(n), _keys(keys), c, 1)
        library.project_f32(g.data_ptr(), down.data_ptr(), d, *rows, _log2(n), _keys(keys), c, 1)
        if not check.same_bits(up, check.lift(z, base, D, n, keys, c, rows)):
            return False
        if not check.same_bits(down, check.project(g, d, D, n, keys, c, rows)):
            return False
    rows, d = (5, 105), 45
    A = check.sign_matrix(rows, d, key)
    z, g = torch.arange(d).sin(), torch.arange(100).cos()
    up, down = torch.empty_like(g), torch.empty_like(z)
    library.sign_lift_f32(z.data_ptr(), d, None, up.data_ptr(), *rows, key, 1.0, 1)
    library.sign_project_f32(g.data_ptr(), down.data_ptr(), d, *rows, key, 1.0, 1)
    wanted = (A @ z.double(), A.T @ g.double())
    return all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip((up, down), wanted, strict=True))


def overlap(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors share some of their memory but not all of it from the start."""
    if a is None or _start(a) == _start(b):
        return False
    return _start(a) < _start(b) + 4 * b.numel() and _start(b) < _start(a) + 4 * a.numel()


def _start(t: Tensor) -> int:
    return t.data_ptr()


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _keys(keys: tuple[int, int, int]) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 3)(*keys)


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // ROWS_PER_THREAD))
