"""Two processes over gloo: each finds its share of the bases, both have all, and no update enters what they protect."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.sharing import gather_tensors, part_of_this_process, share_tensors
from subspace_lab.methods.continual.projection import GPM

CPU = torch.device("cpu")


def batches(*_: Any, **__: Any) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    yield {"inputs": torch.randn(60, 5, generator=generator) @ torch.randn(5, 20, generator=generator)}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    method = GPM(threshold=0.9999)
    model = method.prepare(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)))
    task = TaskContext(
        index=0,
        tasks=2,
        columns=range(4),
        head="single",
        device=CPU,
        seed=0,
        batches=batches,
        forward=lambda model, batch: model(batch["inputs"]),
        loss=lambda model, batch: model(batch["inputs"]).sum(),
        leads=rank == 0,
        share=lambda tensors: share_tensors(tensors, CPU),
        split=part_of_this_process,
        gather=lambda tensors: gather_tensors(tensors, CPU),
    )
    remembered: list[str] = []
    remember = method.remember
    method.remember = lambda path, *more: remembered.append(path) or remember(path, *more)  # type: ignore[method-assign, func-returns-value]
    method.begin_task(model, task)
    method.install(model, 0)
    method.end_task(model, task)
    assert remembered == [("0", "2")[rank]], "each basis is found once"
    method.install(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = method.build_optimizer(model, partial(AdamW, lr=0.01, weight_decay=0.1))
    ddp = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(10 + rank)  # other examples in each process
    for _ in range(10):
        optimizer.zero_grad()
        x, y = torch.randn(3, 20, generator=generator), torch.randint(4, (3,), generator=generator)
        cross_entropy(ddp(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for path, M in method.memory.items():
        D = model.get_parameter(f"{path}.weight").detach() - before[f"{path}.weight"]
        assert M.shape[1] and D.norm() > 0.01
        assert (D @ M).norm() <= 1e-5 * D.norm()
    torch.save([dict(method.memory.items()), model.state_dict()], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_bases_found_once_bind_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # where the host's name leads nowhere
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
