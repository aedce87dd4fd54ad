"""How often a classifier is wrong on a data set: exact counts, without a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subspace_lab.training.tasks import Classification


@dataclass(frozen=True)
class Score:
    """What a pass over a data set found.

    Attributes:
        correct: right answers.
        examples: examples.
        loss: mean cross-entropy, nats.
    """

    correct: int
    examples: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Right answers / examples."""
        return self.correct / self.examples

    @property
    def errors(self) -> int:
        """Wrong answers."""
        return self.examples - self.correct


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Score:
    """Score a model in evaluation mode on batches, on the device where its parameters are."""
    task = Classification()
    device = next(model.parameters()).device
    sums = task.sums(device)
    training = model.training
    model.eval()
    for batch in batches:
        sums.add(*task.measure(model, {name: tensor.to(device) for name, tensor in batch.items()}))
    model.train(training)
    loss, correct, examples = sums.local().tolist()
    return Score(int(correct), int(examples), loss / max(examples, 1))
