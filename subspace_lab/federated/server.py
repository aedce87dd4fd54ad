"""What a server keeps between two rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from subspace_lab import build

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.federated.client import ClientPool


@dataclass
class ServerStanding:
    """Where a run stands between two rounds.

    Attributes:
        task: the one at hand, from 0.
        round: rounds behind, of the whole run.
        begun: rounds before this task.
        matrix: a row of accuracies for each task behind.
        ranks: protected directions of each layer after each task behind.
        bytes_up: sent by clients so far.
        bytes_down: sent to clients so far.
        server_seconds: spent on aggregation and projection.
        client_seconds: spent on waiting for clients.
        task_end_seconds: of what followed each task.
        task_end_bytes: sent after each task, both ways.
    """

    task: int = 0
    round: int = 0
    begun: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    task_end_seconds: list[float] = field(default_factory=list)
    task_end_bytes: list[int] = field(default_factory=list)


class GlobalModel:
    """The model that the server has.

    Args:
        pool: whose model serves to look at it.

    Attributes:
        weights: w (size,), float32.
    """

    def __init__(self, pool: ClientPool) -> None:
        self._pool = pool
        self.weights = pool.layout.read(pool.model)

    def module(self) -> nn.Module:
        """The pool's model, with these weights until clients are trained again."""
        self._pool.layout.write(self._pool.model, self.weights)
        return self._pool.model

    @torch.no_grad()
    def measure(self, task: int, part: str, after: int | None = None) -> dict[str, float]:
        """Figures on a part of a task, as the model answers after task `after` (None: after this one)."""
        pool, model = self._pool, self.module().eval()
        objective, data = pool.objective, pool.tasks[task].data
        objective.current, objective.judged = task if after is None else after, task
        loader = data.test_dataloader() if part == "test" else data.val_dataloader()
        sums = objective.sums(pool.device)
        with pool.method.as_of(model, task):
            for batch in loader:
                placed = {name: tensor.to(pool.device, non_blocking=True) for name, tensor in batch.items()}
                sums.add(*objective.measure(model, placed))
        found = objective.figures(sums.local(), "part")
        return {name.removeprefix("part/"): value for name, value in found.items()}


def learning_rates(cfg: DictConfig, pool: ClientPool, task: int, rounds: int) -> list[tuple[float, float]]:
    """(factor, learning rate) of the clients in each round of a task; the schedule is of each task.

    Args:
        cfg: the configuration, of which `scheduler` counts rounds here.
        pool: the clients.
        task: which.
        rounds: how many it has.
    """
    pool.enter(task)
    probe = pool.optimizer({name: p for name, p in pool.model.named_parameters() if p.requires_grad})
    base = float(probe.param_groups[0]["lr"])
    schedule, found = build.build_scheduler(cfg, probe, rounds), []
    for _ in range(rounds):
        lr = float(probe.param_groups[0]["lr"])
        found.append((lr / base, lr))
        probe.step()
        schedule.step()
    return found
