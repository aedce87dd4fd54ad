"""How processes share a model: all of it on each (DDP), or a part of every parameter (FSDP2), cut along a dimension."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from typing_extensions import override

from subspace_lab.optim.shards import is_sharded
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from torch.optim import Optimizer


# For one another: after a task the first process may gather activations for longer than Lightning's half an hour.
PATIENCE = timedelta(hours=2)


def strategy_of(name: str, *, gpu: bool, processes: int) -> Strategy | Literal["auto"]:
    """Return Lightning's strategy.

    Args:
        name: auto, ddp or fsdp.
        gpu: whether processes talk over NCCL, else over gloo.
        processes: their number.
    """
    backend = "nccl" if gpu else "gloo"
    if name == "ddp":
        return DDPStrategy(
            process_group_backend=backend,
            gradient_as_bucket_view=True,
            # Else DDP lays its buckets out anew after its first step, and a resumed run would sum in another order.
            find_unused_parameters=True,
            timeout=PATIENCE,
        )
    if name == "fsdp":
        return ShardedStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # one file, as every other run writes
            process_group_backend=backend,
            timeout=PATIENCE,
        )
    return "auto"


def shard(model: nn.Module, mesh: DeviceMesh, dimensions: Mapping[str, int] | None = None) -> list[list[nn.Parameter]]:
    """Shard a model in place: each block (an item of a ModuleList or of a Sequential) by itself, then what is left.

    FSDP2 cuts dimensions other than the first into equal parts only: a weight that does not come out even is cut along
    the first, and a note says so.

    Args:
        model: with its final parameters.
        mesh: one-dimensional, the processes that share the weights.
        dimensions: parameter name -> the dimension to cut; 0 for all others.

    Returns:
        The parameters, whole as they were, that are gathered together: of each block, last of what is left.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    along, uneven = {}, []
    for name, parameter in model.named_parameters():
        dimension = (dimensions or {}).get(name, 0)
        if parameter.shape[dimension] % mesh.size() if dimension else False:
            uneven.append(name)
            dimension = 0
        along[parameter] = Shard(dimension)
    if uneven:
        first = next(p for n, p in model.named_parameters() if n == uneven[0])
        warnings.warn(
            f"{len(uneven)} weights such as {uneven[0]} {tuple(first.shape)} do not divide by {mesh.size()} processes "
            "along the longer side: they are cut along the other one, and their bases are of the longer",
            stacklevel=2,
        )

    def place(parameter: nn.Parameter) -> Shard:
        return along[parameter]

    blocks: dict[nn.Module, None] = {}
    for parent in reversed(list(model.modules())):  # inner ones first
        if parent is not model and isinstance(parent, nn.ModuleList | nn.Sequential):
            for child in parent:
                if any(True for _ in child.children()) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    blocks[child] = None
    groups = []
    for block in [*blocks, model]:
        groups.append([p for p in block.parameters() if not is_sharded(p)])
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    return groups


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, which also saves and loads optimizers that key their state by parameter name."""

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(optimizer, SubspaceOptimizer):
            return super().optimizer_state(optimizer)
        state = optimizer.state_dict()  # all processes together put the moments together
        return state if self.global_rank == 0 else {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        ours = {i: o for i, o in enumerate(self.optimizers) if isinstance(o, SubspaceOptimizer)}
        everything = self.optimizers
        # Lightning's way with what it knows; no list but this one says which optimizers it loads.
        self._optimizers = [o for i, o in enumerate(everything) if i not in ours]
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            self._optimizers = everything
        for i, optimizer in ours.items():
            optimizer.load_state_dict(checkpoint["optimizer_states"][i])
        return checkpoint
