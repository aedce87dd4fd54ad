"""What a merging method that looks at examples is given; the protocol makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from subspace_lab.data.packing import Batch

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class TaskBench:
    """One task as merging methods see it.

    Attributes:
        name: of the task.
        head: features (n, f) -> logits (n, classes); frozen.
        draw: (part, examples per batch, seed) -> endless shuffled batches on the device, "labels" (n,) among them.
            Methods that call themselves transductive draw from `test` and do not look at the labels.
        examples: of each part.
    """

    name: str
    head: Callable[[Tensor], Tensor]
    draw: Callable[[Part, int, int], Iterator[Batch]]
    examples: Mapping[Part, int]


@dataclass(frozen=True)
class Workshop:
    """The model, its weights, and the tasks.

    Attributes:
        model: the encoder, in evaluation mode, without gradients; call it through `features` only: its own weights are
            the base's and stay so.
        base: W0 of every tensor that is merged, by name, on the device.
        models: W_t of the same tensors, in the order of `tasks`.
        tasks: T of them.
        seed: of the run.
        device: where all of this is.
        tell: shows a line of progress.
    """

    model: nn.Module
    base: Mapping[str, Tensor]
    models: Sequence[Mapping[str, Tensor]]
    tasks: Sequence[TaskBench]
    seed: int
    device: torch.device
    tell: Callable[[str], None]

    def features(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Features (n, f) of a batch under other weights, by `torch.func.functional_call`: differentiable in them."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found = torch.func.functional_call(self.model, dict(weights), (inputs["inputs"],), strict=False)
        assert isinstance(found, Tensor)
        return found

    def logits(self, weights: Mapping[str, Tensor], task: int, batch: Batch) -> Tensor:
        """Logits (n, classes) of a task's batch under other weights."""
        return self.tasks[task].head(self.features(weights, batch))
