"""How good weights are on every task of a suite: accuracies, losses, entropies and what is predicted how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_lab import interrupt
from subspace_lab.data.loaders import ValidationBatches, ValidationLoader
from subspace_lab.data.order import EpochOrder, mix
from subspace_lab.data.packing import Batch
from subspace_lab.linalg.precision import full_precision
from subspace_lab.merging.workshop import Part, Workshop

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class TaskFigures:
    """Figures of one task.

    Attributes:
        accuracy: share of examples whose largest logit is their class's.
        loss: mean cross-entropy in nats.
        entropy: mean entropy of the predicted distributions in nats.
        marginals: share of predictions of each class; one far above its share in the data is a collapse.
    """

    accuracy: float
    loss: float
    entropy: float
    marginals: list[float] = field(default_factory=list)


def figures(workshop: Workshop, weights: Mapping[str, Tensor], part: Part, data: Sequence[Any]) -> list[TaskFigures]:
    """Return the figures of all tasks under `weights`.

    Args:
        workshop: the encoder and the heads.
        weights: of the encoder.
        part: test or validation.
        data: the tasks' data, as `TaskSuite.tasks` gives them.
    """
    return [task_figures(workshop, weights, index, part, one) for index, one in enumerate(data)]


@full_precision
@torch.no_grad()
def task_figures(workshop: Workshop, weights: Mapping[str, Tensor], index: int, part: Part, data: Any) -> TaskFigures:
    """Return the figures of one task; nothing leaves the device before its end."""
    sums: Tensor | None = None
    count = 0
    for batch in in_order(data, part, workshop.device):
        if interrupt.requested() is not None:
            raise KeyboardInterrupt
        logits = workshop.logits(weights, index, batch).float()
        labels = batch["labels"]
        log_p = logits.log_softmax(-1)
        predicted = logits.argmax(-1)
        found = torch.cat(
            [
                torch.stack(
                    [
                        (predicted == labels).sum().double(),
                        -log_p.gather(1, labels[:, None]).sum().double(),
                        -(log_p.exp() * log_p).sum().double(),
                    ]
                ),
                torch.bincount(predicted, minlength=logits.shape[1]).double(),
            ]
        )
        sums = found if sums is None else sums + found
        count += len(labels)
    assert sums is not None
    correct, loss, entropy, *marginals = (sums / count).tolist()
    return TaskFigures(correct, loss, entropy, marginals)


def in_order(data: Any, part: Part, device: torch.device) -> Iterator[Batch]:
    """All examples of a part once, in order, on a device."""
    examples = getattr(data.parts, part)
    batches = ValidationBatches(examples, _EVALUATION_BATCH, 0, 1)
    for batch in ValidationLoader(batches, data.num_workers):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def drawer(data: Any, index: int, device: torch.device) -> Callable[[Part, int, int], Iterator[Batch]]:
    """What draws endless shuffled batches of a task's part, by a seed."""

    def draw(part: Part, size: int, seed: int) -> Iterator[Batch]:
        examples = getattr(data.parts, part)
        order = EpochOrder(len(examples), mix(seed, index))
        k = 0
        while True:
            rows = order.batch(k, min(size, len(examples)), 0, 1)
            yield {name: tensor.to(device) for name, tensor in examples.batch(rows).items()}
            k += 1

    return draw


@dataclass(frozen=True)
class Scale:
    """The merging coefficient λ and where it is from.

    Attributes:
        value: λ.
        chosen: given; validation: the best of the grid by mean normalised validation accuracy; none: the method has
            no such coefficient.
        curve: (λ, mean normalised validation accuracy) of the grid.
    """

    value: float
    chosen: Literal["given", "validation", "none"]
    curve: list[tuple[float, float]] = field(default_factory=list)


def choose_scale(
    scales: Sequence[float], weights_at: Callable[[float], Mapping[str, Tensor]], score: Callable[[Any], float]
) -> Scale:
    """Return the best λ of a grid, the smallest of equally good ones.

    Args:
        scales: the grid.
        weights_at: merged weights by λ.
        score: of weights, on validation data.
    """
    curve = [(scale, score(weights_at(scale))) for scale in sorted(scales)]
    best = max(curve, key=lambda point: point[1])
    return Scale(best[0], "validation", curve)


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def normalized(accuracies: Sequence[float], experts: Sequence[float]) -> float:
    """Mean over tasks of the accuracy divided by the expert's (Ortiz-Jimenez et al., NeurIPS 2023)."""
    return mean([a / e if e else 0.0 for a, e in zip(accuracies, experts, strict=True)])


@torch.no_grad()
def similarities(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Lengths ‖D_t‖ of the task vectors, and cosines between any two; all tensors of floating point together."""
    G = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name, W in base.items():
        if W.is_floating_point():
            D = torch.stack([(state[name] - W).flatten() for state in models]).double()
            G += (D @ D.mT).cpu()
    norms = G.diagonal().sqrt()
    cosines = G / norms.outer(norms).clamp_min(torch.finfo(G.dtype).tiny)
    return {"norms": norms.tolist(), "cosines": cosines.tolist()}
