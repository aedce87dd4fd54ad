"""A small network, its experts and unlabelled examples, as methods that learn to merge are given them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from subspace_lab.data.packing import Batch
from subspace_lab.merging.workshop import Part, TaskBench, Workshop

CLASSES = 4
SIDE = 4


class Encoder(nn.Module):
    """Patches, attention, an MLP that is partly frozen, statistics and a counter: every kind of tensor there is."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.3 * torch.randn(4, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)
        self.unused = nn.Linear(3, 5)
        self.down.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT + self.position
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(q, k, v)
        x = x + self.down(functional.gelu(self.up(x)))
        y: Tensor = self.norm(x.mean(1))
        return y


def images(task: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Four prototypes with noise, negated, turned or as they are."""
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
    generator.manual_seed(10 + task)
    labels = torch.arange(count) % CLASSES
    found = prototypes[labels] + 0.5 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    turned = [found, -found, found.mT, found.flip(3)][task % 4].contiguous()
    return turned, labels


def batches(inputs: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield {"inputs": inputs[rows], "labels": labels[rows]}


def bench(task: int, dtype: torch.dtype, device: torch.device) -> TaskBench:
    generator = torch.Generator().manual_seed(2)
    H = torch.randn(CLASSES, 8, generator=generator).to(device, dtype)
    inputs, labels = (value.to(device) for value in images(task))

    def draw(part: Part, size: int, seed: int) -> Iterator[Batch]:
        first = {"train": 0, "validation": 20, "test": 30}[part]
        last = {"train": 20, "validation": 30, "test": 60}[part]
        return batches(inputs[first:last].to(dtype), labels[first:last], size, seed)

    return TaskBench(f"task{task}", lambda x: x @ H.mT, draw, {"train": 20, "validation": 10, "test": 30})


def workshop(
    tasks: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda line: None,
    steps: int = 15,
) -> Workshop:
    """Experts fine-tuned for a few steps on task 0, 1, … each."""
    where = torch.device(device)
    model = Encoder().to(where, dtype).eval()
    benches = [bench(t, dtype, where) for t in range(tasks)]
    models = []
    for t in range(tasks):
        expert = copy.deepcopy(model)
        optimizer = torch.optim.Adam([p for p in expert.parameters() if p.requires_grad], 3e-3)
        for _, batch in zip(range(steps), benches[t].draw("train", 20, t), strict=False):
            optimizer.zero_grad()
            functional.cross_entropy(benches[t].head(expert(batch["inputs"])), batch["labels"]).backward()
            optimizer.step()
        expert.norm.running_mean += 0.01 * (t + 1)
        expert.norm.num_batches_tracked += t + 1
        models.append({name: value.detach().clone() for name, value in expert.state_dict().items()})
    for p in model.parameters():
        p.requires_grad_(False)
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Workshop(model, base, models, benches, seed, where, tell)
