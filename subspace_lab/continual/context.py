"""What a method may know of the task at hand: plain callables, which a notebook or a federated client can make too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from subspace_lab.data.packing import Batch

Head = Literal["task", "class", "single"]


class Batches(Protocol):
    """Training examples of the task, unaugmented, on the device."""

    def __call__(
        self, count: int | None = None, batch_size: int | None = None, purpose: str = "bases"
    ) -> Iterator[Batch]:
        """Give `count` examples drawn at random without replacement (None: all of them, in order).

        The draw depends on the run's seed, the task and `purpose` only. Labels are output columns, as in training.
        """


@dataclass(frozen=True)
class TaskContext:
    """One task of a sequence.

    Attributes:
        index: its number, from 0.
        tasks: how many the sequence has.
        columns: which of the model's outputs are its classes (all of them with a single head).
        head: task: each task has its own outputs and is told at test time; class: own outputs, not told; single: all
            tasks share the outputs.
        device: where the model is.
        seed: from which the task's random choices are derived; differs between tasks.
        batches: training examples.
        forward: runs the model on a batch as training does (activation hooks see what they would see).
        loss: mean training loss of a batch, with graph.
        leads: whether this process is the first; others get what `share` hands on.
        share: takes tensors by name on the first process (what others give is ignored) and returns them on every one.
        split: of names, those that this process works on; each is one process's.
        gather: takes the tensors that each process has made of its names, and returns all on every one.
    """

    index: int
    tasks: int
    columns: range
    head: Head
    device: torch.device
    seed: int
    batches: Batches
    forward: Callable[[nn.Module, Batch], Any]
    loss: Callable[[nn.Module, Batch], Tensor]
    leads: bool = True
    share: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    split: Callable[[Sequence[str]], list[str]] = list
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
