"""Clients that do arithmetic: what Flower's workers import in tests, quick to build and exact to check."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated.exchange import Question, Work


class ArithmeticClients:
    def __init__(self, cfg: DictConfig, device: str = "cpu") -> None:
        self.cfg, self.device = cfg, device

    def groups(self, clients: Sequence[int], task: int) -> list[list[int]]:
        return [[client] for client in clients]

    def train(self, weights: Tensor, clients: Sequence[int], work: Work) -> Tensor:
        for client in clients if self.cfg.get("only_in_task", work.task) == work.task else ():
            if client in self.cfg.get("failing", ()):
                raise ZeroDivisionError("no examples\nsecond line")
            if client in self.cfg.get("refusing", ()):
                raise UserError("this client has no data", hint="give it some")
            if client in self.cfg.get("dying", ()):
                os._exit(3)
            if client in self.cfg.get("sleeping", ()):
                Path(self.cfg.marker).touch()
                time.sleep(600)
        generator = torch.Generator().manual_seed(work.round * 1000 + work.task)
        noise = torch.randn(1000, len(weights), generator=generator)[list(clients)]
        return noise * work.lr_scale * 1e-2 - 0.1 * weights

    def answer(self, weights: Tensor, clients: Sequence[int], question: Question) -> list[dict[str, Tensor]]:
        return [getattr(self, question.name)(weights, client, dict(question.tensors)) for client in clients]

    def echo(self, weights: Tensor, client: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weights": weights, **tensors, "client": torch.tensor(float(client), dtype=torch.float64)}

    def sketch(self, weights: Tensor, client: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(client)
        sketch = torch.randn(7, 3, generator=generator) @ tensors["basis"]
        return {"sketch": sketch, "count": torch.tensor(float(client + 1), dtype=torch.float64)}

    def where(self, weights: Tensor, client: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "process": torch.tensor(float(os.getpid()), dtype=torch.float64),
            "threads": torch.tensor(float(torch.get_num_threads())),
            "telemetry": torch.tensor(
                float(os.environ["FLWR_TELEMETRY_ENABLED"] + os.environ["RAY_USAGE_STATS_ENABLED"])
            ),
        }

    def huge(self, weights: Tensor, client: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": torch.full((3,), float(tensors["value"]))}


def arithmetic(cfg: DictConfig, device: str) -> Any:
    return ArithmeticClients(cfg, device)
