"""What a federated method is: rules of a server, plain functions on the updates of the clients.

Order of calls in a run:

    prepare(model)                                 once, on the server and wherever clients are
    check(participants)                            once
    for each task (a single one without a scenario)
        for each round
            aggregate(updates, weights, …)         on the server: one update out of the participants'
            constrain(update, model)               on the server: what of it the weights may take
        finish_task(gather, index)                 on the server; `gather` asks participants, who call `answer`

FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv 1602.05629.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod

Gather = Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Round:
    """What a server knows of a round besides the updates.

    Attributes:
        index: from 0, over the whole run.
        clients: the participants, in ascending order.
        steps: optimizer steps that each of them has taken.
        lr: their learning rate.
        seed: from which random choices of the round are derived.
        single_steps: w_{k+1} − w_k (N, n) of the client that `wants_steps` names, None if it names none.
        lr_scale: what `scheduler` makes of the learning rate in this round, as a factor.
    """

    index: int
    clients: tuple[int, ...]
    steps: tuple[int, ...]
    lr: float
    seed: int
    single_steps: Tensor | None = None
    lr_scale: float = 1.0


class FederatedMethod(ContinualMethod):
    """Base of all methods of `protocol=federated`, and federated averaging itself.

    Args:
        server_lr: factor of the aggregated update when it is added to the weights.

    Attributes:
        needs_each: whether the server has to see every update; else their weighted sum is all that it is given.
    """

    name: ClassVar[str] = "fedavg"
    protocols: ClassVar[tuple[str, ...]] = ("federated",)
    needs_each: ClassVar[bool] = False

    def __init__(self, server_lr: float = 1.0) -> None:
        if server_lr <= 0:
            raise UserError(f"method.server_lr={server_lr}: expected a positive number")
        self.server_lr = server_lr

    def check(self, participants: int) -> None:
        """Refuse numbers of participants that the rule is not made for.

        Raises:
            UserError: too few of them.
        """

    def always(self) -> tuple[int, ...]:
        """Clients that take part in every round."""
        return ()

    def wants_steps(self) -> int | None:
        """A client whose single optimizer steps `aggregate` wants to see; None: of nobody."""
        return None

    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        """One update out of the participants'.

        Args:
            updates: w_c − w (p, n), float32, a row for each participant.
            weights: (p,), sum 1.
            parts: where each parameter lies in a row.
            about: the round.

        Returns:
            (n,), of which `server_lr` times is added to w.
        """
        return weights.to(updates.dtype) @ updates

    def constrain(self, update: Mapping[str, Tensor]) -> None:
        """Take out of an aggregated update, in place, what the weights must not take.

        Args:
            update: name of a parameter -> its part of the update, in its shape.
        """

    def finish_task(self, gather: Gather, index: int) -> None:
        """Take in what the finished task has to be remembered by.

        Args:
            gather: asks the participants of the task's last round; given a name and tensors by name it returns the sums
                over the participants of what `answer` returned to each.
            index: of the task.
        """

    def answer(
        self, name: str, tensors: Mapping[str, Tensor], model: nn.Module, task: TaskContext
    ) -> dict[str, Tensor]:
        """What one client says when the server asks.

        Args:
            name: of the question.
            tensors: that the server has sent with it.
            model: with the weights that the server has sent.
            task: this client's examples of the task.
        """
        raise NotImplementedError(f"{type(self).__name__} asks nothing")


class FedAvg(FederatedMethod):
    """The weighted mean of the updates."""
