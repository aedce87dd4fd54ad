"""Fully sharded training (FSDP2): every process holds a part of each parameter, cut along its first dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model in place: each block (an item of a ModuleList or of a Sequential) by itself, then what is left.

    Args:
        model: with its final parameters.
        mesh: one-dimensional, the processes that share the weights.
    """
    from torch.distributed.fsdp import fully_shard

    blocks: dict[nn.Module, None] = {}
    for parent in reversed(list(model.modules())):  # inner ones first
        if parent is not model and isinstance(parent, nn.ModuleList | nn.Sequential):
            for child in parent:
                if any(True for _ in child.children()) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    blocks[child] = None
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must ask); any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor
