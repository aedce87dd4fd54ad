"""Coefficients λ of task vectors: learnt by entropy, used tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_lab.merging.base import Stack
from subspace_lab.merging.entropy import Progress, TestEntropy
from subspace_lab.merging.learning import lookup
from subspace_lab.merging.task_vectors import TaskVectors

Wise = Literal["layer", "task"]


def initial_coefficients(vectors: TaskVectors, wise: Wise, initial: float, device: torch.device) -> Tensor:
    """λ (T, K) or (T, 1) before it is learnt, a leaf."""
    columns = len(vectors.names) if wise == "layer" else 1
    return torch.full((vectors.models, columns), float(initial), device=device, requires_grad=True)


def clamped(raw: Tensor, clamp: bool) -> Tensor:
    """λ as it is used; outside [0, 1] no gradient comes back, as released."""
    return raw.clamp(0, 1) if clamp else raw


def coefficients_by_name(used: Tensor, vectors: TaskVectors) -> dict[str, Tensor]:
    """Λ (T,) of every tensor, on the CPU."""
    columns = used.expand(-1, len(vectors.names)).cpu().unbind(1)
    return {name: column.clone() for name, column in zip(vectors.names, columns, strict=True)}


def describe_coefficients(used: Tensor, steps: int, wise: Wise) -> dict[str, Any]:
    """For results.json: mean, least and greatest λ of every task."""
    rounded = {
        name: [round(v, 5) for v in value.tolist()]
        for name, value in {"mean": used.mean(1), "least": used.amin(1), "greatest": used.amax(1)}.items()
    }
    return {"steps": steps, "wise": wise, "coefficients": rounded}


def weighted_sum(stack: Stack, coefficients: Mapping[str, Tensor]) -> Tensor:
    """Σ_t λ_t D_t of a stack, with λ (T,) of every tensor."""
    table = torch.stack([lookup(coefficients, name) for name in stack.names])
    total: Tensor | None = None
    for t, D in enumerate(stack.deltas()):
        D.mul_(table[:, t].to(D).view(-1, *[1] * len(stack.shape)))
        total = D if total is None else total.add_(D)
    assert total is not None
    return total


def adapt(
    raw: Tensor,
    merged: Callable[[Tensor], Mapping[str, Tensor]],
    objective: TestEntropy,
    *,
    clamp: bool,
    lr: float,
    steps: int,
    what: str,
) -> None:
    """Adam on λ, in place, towards less entropy.

    Args:
        raw: λ (T, K) or (T, 1), a leaf.
        merged: λ as it is used -> weights by name.
        objective: whose entropy.
        clamp: use λ clamped to [0, 1].
        lr: learning rate.
        steps: of Adam.
        what: for the lines of progress.
    """
    optimizer = torch.optim.Adam([raw], lr=lr)
    progress = Progress(objective.workshop, what, steps)
    for index in range(steps):
        optimizer.zero_grad()
        entropy = objective.backward(merged(clamped(raw, clamp)))
        optimizer.step()
        progress.step(index, entropy)
