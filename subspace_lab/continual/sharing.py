"""Tensors that one process computes and all have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_tensors(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the first process's tensors on every process; what others give is ignored.

    Names, shapes and dtypes go ahead, so that the values themselves travel on the device.

    Args:
        tensors: by name.
        device: where the other processes get them; the first keeps its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    leads = torch.distributed.get_rank() == 0
    about: list[Any] = [[(n, tuple(t.shape), t.dtype, t.device.type) for n, t in tensors.items()] if leads else None]
    torch.distributed.broadcast_object_list(about, src=0, device=device if device.type == "cuda" else None)
    shared = {}
    for name, shape, dtype, kind in about[0]:
        value = tensors[name].to(device).contiguous() if leads else torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(value, src=0)
        shared[name] = tensors[name] if leads else value.to(kind)
    return shared
