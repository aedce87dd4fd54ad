"""FSDP2 over gloo: two processes that hold half of the class subspaces each step them as one process steps all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from subspace_lab.methods.gcr import GCR
from subspace_lab.optim.shards import whole
from subspace_lab.training.sharding import shard

CLASSES = 5  # an odd number: the processes get three and two


def train(model: nn.Module, rows: slice) -> None:
    method = GCR(k=3)
    optimizer = method.build_optimizer(model, partial(AdamW, lr=0.01))
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        x, y = torch.randn(8, 12, generator=generator), torch.randint(CLASSES, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert method.metrics()["orthonormality"] < 2e-6


def build() -> nn.Module:
    torch.manual_seed(0)
    return GCR(k=3).prepare(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES)))


def process(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = build()
    shard(model, init_device_mesh("cpu", (2,)))
    assert [len(p.to_local()) for p in model[2].parameters()] == [3 - rank]  # type: ignore[index]
    train(model, slice(4 * rank, 4 * rank + 4))
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_halves_step_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # where the host's name leads nowhere
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    alone = build()
    train(alone, slice(0, 8))
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(together[name], p.detach(), rtol=0, atol=1e-5)
