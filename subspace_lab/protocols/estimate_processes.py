"""`estimate=true` of a run with several processes: what each would hold and send.

The parts of the run are those of a real one: FSDP2 shards the model, the optimizer divides its refreshes, and every
collective is counted. Only tensors are shapes (torch's fake tensors), and the other processes are torch's fake group,
which answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subspace_lab import build

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from subspace_lab.build import DataModule
    from subspace_lab.methods.base import Method
    from subspace_lab.training.trainer import TrainerPlan

# GPUs of a machine where none is here to be counted.
USUAL_GPUS = 8


@dataclass(frozen=True)
class Share:
    """What one of several processes holds and sends.

    Attributes:
        weights: bytes of its part of the parameters.
        gradients: bytes of its part of the gradients.
        gathered: bytes of whole parameters that FSDP2 has together at a time: of the root, a block and the next one.
        state: bytes of the optimizer's tensors.
        sent: bytes that it sends for one micro-batch and one step, by ring algorithms.
        sent_refresh: bytes more in a step that refreshes all bases.
    """

    weights: int
    gradients: int
    gathered: int
    state: int
    sent: float
    sent_refresh: float


def processes(plan: TrainerPlan, notes: list[str]) -> int:
    """Return how many processes the run would have; what had to be assumed is appended to `notes`."""
    import torch

    if plan.devices == "auto":
        several = plan.strategy in ("ddp", "fsdp") and plan.accelerator != "cpu"
        plan.devices = torch.cuda.device_count() or (USUAL_GPUS if several else 1)
        if several and not torch.cuda.device_count():
            notes.append(f"no GPU here to count: {USUAL_GPUS} per machine (set trainer.devices)")
    return plan.world_size


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """Let this process be the first of `size`, whose collectives return at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_of(
    cfg: DictConfig, plan: TrainerPlan, method: Method, model: nn.Module, data: DataModule, size: int
) -> Share:
    """Return what the first of `size` processes holds and sends; in a `fake_group` and under fake tensors.

    Args:
        cfg: the configuration.
        plan: its trainer group.
        method: has prepared the model.
        model: of fake tensors; is sharded in place with trainer=fsdp.
        data: gives a blank batch.
        size: the number of processes.
    """
    import torch

    from subspace_lab.analysis.communication import Communication
    from subspace_lab.optim.shards import local
    from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
    from subspace_lab.protocols.fit import state_bytes

    def total(tensors: list[Any]) -> int:
        return sum(t.numel() * t.element_size() for t in map(local, tensors))

    sharded = plan.strategy == "fsdp"
    gathered = _shard(model, method, size) if sharded else 0
    learnt = [p for p in model.parameters() if p.requires_grad]
    with Communication() as passes:
        if sharded:
            data.task().loss(model, data.blank_batch()[0]).backward()  # type: ignore[no-untyped-call]
    for p in learnt:
        if p.grad is None:
            p.grad = torch.empty_like(p)
    gradients = total([p.grad for p in learnt])
    method.per_layer = False
    optimizer = build.build_optimizer(cfg, method, model)
    if isinstance(optimizer, SubspaceOptimizer) and not sharded:
        optimizer.share_refreshes()
    with Communication() as first:
        optimizer.step()
    with Communication() as plain:
        optimizer.step()
    if not sharded:  # DDP reduces every gradient once
        passes.kinds["all_reduce"].bytes = gradients
    return Share(
        weights=total(list(model.parameters())),
        gradients=gradients,
        gathered=gathered,
        state=state_bytes(optimizer),
        sent=passes.sent(size) + plain.sent(size),
        sent_refresh=first.sent(size) - plain.sent(size),
    )


def _shard(model: nn.Module, method: Method, size: int) -> int:
    """Shard a model; return the bytes that are gathered at a time."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.device_mesh import init_device_mesh

    from subspace_lab.training.sharding import shard

    with unset_fake_temporarily():
        mesh = init_device_mesh("cpu", (size,))
    groups = [
        sum(p.numel() * p.element_size() for p in ps) for ps in shard(model, mesh, method.shard_dimensions(model))
    ]
    *blocks, root = groups
    return root + sum(sorted(blocks)[-2:])
