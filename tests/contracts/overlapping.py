"""A ReLU network and tasks whose inputs share most of their directions, for methods that reuse protected subspaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from contracts.continual import task
from torch import Tensor, nn

from subspace_lab.continual.context import TaskContext


def relu_model(double: bool = True) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(20, 14, bias=False),
        nn.ReLU(),
        nn.Linear(14, 14, bias=False),
        nn.ReLU(),
        nn.Linear(14, 5, bias=False),
    )
    return net.double() if double else net


def overlapping(index: int) -> TaskContext:
    """Tasks whose inputs share most of their directions: 20-dimensional, double."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.linalg.qr(torch.randn(20, 8, generator=generator))[0]
    mine = torch.Generator().manual_seed(50 + index)
    turned = torch.linalg.qr(shared + 0.1 * torch.randn(20, 8, generator=mine))[0]
    strength = torch.tensor([3, 2.5, 2, 1.5, 1, 0.8, 0.4, 0.2])
    x = ((torch.randn(60, 8, generator=mine) * strength) @ turned.T).double()
    y = (x @ torch.randn(20, 5, generator=mine).double()).argmax(1)

    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Any]:
        for part in torch.arange(60).split(batch_size or 25):
            yield {"inputs": x[part], "labels": y[part]}

    return replace(task(index), batches=batches)


def whole(now: TaskContext) -> tuple[Tensor, Tensor]:
    parts = list(now.batches())
    return torch.cat([b["inputs"] for b in parts]), torch.cat([b["labels"] for b in parts])


def cast(now: TaskContext) -> Any:
    def batches(**given: Any) -> Iterator[Any]:
        for b in now.batches(**given):
            yield {"inputs": b["inputs"].float(), "labels": b["labels"]}

    return batches
