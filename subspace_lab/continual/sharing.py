"""Tensors that one process computes, or each a part of, and all have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes of a run, of the same shape on each; changed in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def part_of_this_process(names: Sequence[str]) -> list[str]:
    """Return the names that this process works on; each is one process's."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(names)
    return list(names)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def share_tensors(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the first process's tensors on every process; what others give is ignored; see `gather_tensors`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        tensors = {}
    return gather_tensors(tensors, device)


def gather_tensors(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of all processes on every process, in the order of processes.

    Names, shapes and dtypes go ahead, so that the values themselves travel on the device.

    Args:
        tensors: by name; no name is on two processes.
        device: where tensors of other processes arrive, to go on to the kind of device where they were; own ones stay.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    mine = [(name, tuple(t.shape), t.dtype, t.device.type) for name, t in tensors.items()]
    about: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(about, mine)
    gathered = {}
    for source, entries in enumerate(about):
        own = source == torch.distributed.get_rank()
        for name, shape, dtype, kind in entries:
            value = tensors[name].to(device).contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
            torch.distributed.broadcast(value, src=source)
            gathered[name] = tensors[name] if own else value.to(kind)
    return gathered
