"""The one place where compiled kernels come in; without them everything runs in torch.

`subspace_lab.projections.native` may be missing, may refuse to build, or may decline an input (device, dtype, size):
its functions return True only if they have written the result. Nothing else here depends on them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch


@functools.cache
def _native() -> Any | None:
    try:
        return importlib.import_module("subspace_lab.projections.native")
    except ImportError:
        return None


def call(name: str, *args: object, **kwargs: object) -> bool:
    """Ask the kernel `name` to do it; False if there is none or it declines."""
    function = getattr(_native(), name, None)
    return function is not None and bool(function(*args, **kwargs))


@functools.cache
def transforms(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `fwht_` takes blocks of n entries of this kind: found out by giving it one."""
    return call("fwht_", torch.zeros(1, n, dtype=dtype, device=device), n)
