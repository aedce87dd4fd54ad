"""What passes between the server and its clients, whoever carries it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from subspace_lab.federated.client import ClientPool

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """One round of local training.

    Attributes:
        task: of the sequence, from 0.
        round: from 0, over the whole run.
        lr_scale: factor of the clients' learning rate.
    """

    task: int
    round: int
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Question:
    """What a server asks clients besides training; `FederatedMethod.answer` answers.

    Attributes:
        name: of the question.
        task: about which, from 0.
        round: after which, from 0, over the whole run.
        tensors: that go with it.
        lr_scale: see `Work`.
    """

    name: str
    task: int
    round: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    lr_scale: float = 1.0

    def work(self) -> Work:
        """The training that is asked about."""
        return Work(self.task, self.round, self.lr_scale)


class Exchange(ABC):
    """The server's way to its clients. Each client replies once, in whatever order."""

    @abstractmethod
    def train(self, weights: Tensor, clients: Sequence[int], work: Work) -> Iterator[tuple[int, Tensor]]:
        """Have clients train from `weights` (n,); gives (client, w_c − w (n,) float32)."""

    @abstractmethod
    def ask(
        self, weights: Tensor, clients: Sequence[int], question: Question
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Have clients answer a question about the model at `weights`; gives (client, tensors)."""

    def sum_train(self, weights: Tensor, clients: Sequence[int], work: Work, coefficients: Sequence[float]) -> Tensor:
        """Σ coefficient · (w_c − w) over the clients (n,), in float64: the same in whatever groups they come."""
        total = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
        factors = dict(zip(clients, coefficients, strict=True))
        for client, update in self.train(weights, clients, work):
            total.add_(update, alpha=factors[client])
        return total

    def sum_ask(self, weights: Tensor, clients: Sequence[int], question: Question) -> dict[str, Tensor]:
        """Sums over the clients of what they answer, in float64."""
        totals: dict[str, Tensor] = {}
        for _, answer in self.ask(weights, clients, question):
            for name, tensor in answer.items():
                if name in totals:
                    totals[name].add_(tensor)
                else:
                    totals[name] = tensor.double()
        return totals


class Engine(ABC):
    """Who runs the clients."""

    @abstractmethod
    def run(self, main: Callable[[Exchange], T]) -> T:
        """Start what has to be started, call `main` once, stop all of it whatever happens."""


class InProcess(Engine, Exchange):
    """All clients in this process and on its device, as many at a time as the pool trains at once.

    Args:
        pool: the clients.
    """

    def __init__(self, pool: ClientPool) -> None:
        self._pool = pool

    @override
    def run(self, main: Callable[[Exchange], T]) -> T:
        return main(self)

    @override
    def train(self, weights: Tensor, clients: Sequence[int], work: Work) -> Iterator[tuple[int, Tensor]]:
        for group in self._pool.groups(clients, work.task):
            yield from zip(group, self._pool.train(weights, group, work), strict=True)

    @override
    def ask(
        self, weights: Tensor, clients: Sequence[int], question: Question
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for client in clients:
            yield client, self._pool.answer(weights, [client], question)[0]
