"""The `federation` group: how many clients there are, what each has, who takes part in a round and who cheats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from subspace_lab.errors import UserError
from subspace_lab.federated.byzantine import Attack
from subspace_lab.federated.partition import Indices, Partition, divide
from subspace_lab.linalg.random import derive_key


class Federation:
    """A federation of clients.

    Args:
        clients: how many there are.
        participation: share of them in each round, in (0, 1]; from 2 on: how many.
        partition: how each task's training examples are divided: iid, shards (of examples sorted by label), dirichlet.
        shards: pieces of each client, for partition=shards.
        alpha: concentration of the Dirichlet distribution, for partition=dirichlet; small: few classes a client.
        rounds: of each task, or a list with those of every task.
        local_epochs: passes of a participant over its examples in a round.
        local_steps: optimizer steps of a participant in a round, in place of passes.
        server_momentum: of the aggregated updates, afresh in every task (FedAvgM: Hsu et al. 2019, arXiv 1909.06335).
        weighting: uniform: participants count equally; samples: by their number of examples (McMahan et al. 2017).
        engine: inprocess: all clients in this process, on its device; flower: Flower's simulation engine.
        byzantine: clients, the first ones, that send something else than their update.
        attack: what they send: sign_flip, random, omniscient.
        secure_aggregation: with engine=flower: the server is given sums alone (SecAgg+).
        seed: of partition and participation; null is the run's.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        clients: int = 10,
        participation: float = 1.0,
        partition: Partition = "iid",
        shards: int = 2,
        alpha: float = 0.5,
        rounds: int | Sequence[int] = 20,
        local_epochs: int = 1,
        local_steps: int | None = None,
        server_momentum: float = 0.0,
        weighting: Literal["uniform", "samples"] = "uniform",
        engine: Literal["inprocess", "flower"] = "inprocess",
        byzantine: int = 0,
        attack: Attack = "sign_flip",
        secure_aggregation: bool = False,
        seed: int | None = None,
    ) -> None:
        for name, value in (("clients", clients), ("shards", shards), ("local_epochs", local_epochs)):
            if value < 1:
                raise UserError(f"federation.{name}={value}: expected at least 1")
        if local_steps is not None and local_steps < 1:
            raise UserError(f"federation.local_steps={local_steps}: expected at least 1, or null for local_epochs")
        if alpha <= 0:
            raise UserError(f"federation.alpha={alpha:g}: expected a positive number")
        if not 0 <= server_momentum < 1:
            raise UserError(f"federation.server_momentum={server_momentum:g}: expected 0 or more, less than 1")
        if not 0 <= byzantine < clients:
            raise UserError(f"federation.byzantine={byzantine}: expected 0 to {clients - 1} of the {clients} clients")
        if seed is not None and seed < 0:
            raise UserError(f"federation.seed={seed}: expected 0 or more", hint="null is the run's seed")
        if secure_aggregation and engine != "flower":
            raise UserError(
                "federation.secure_aggregation=true masks what clients send, and with engine=inprocess nothing is sent",
                hint="federation.engine=flower",
            )
        if secure_aggregation and byzantine:
            raise UserError(
                "federation.secure_aggregation=true hides the updates that the attack of federation.byzantine="
                f"{byzantine} replaces",
                hint="federation.byzantine=0",
            )
        counts = [rounds] if isinstance(rounds, int) else list(rounds)
        if not counts or min(counts) < 1:
            raise UserError(f"federation.rounds={rounds}: expected at least 1, or a list with those of every task")
        self.clients, self.participants = clients, _participants(participation, clients)
        self.partition, self.shards, self.alpha = partition, shards, alpha
        self.local_epochs, self.local_steps, self.weighting = local_epochs, local_steps, weighting
        self.server_momentum = server_momentum
        self.engine, self.byzantine, self.attack = engine, byzantine, attack
        self.secure_aggregation, self._seed, self._rounds = secure_aggregation, seed, rounds

    def rounds(self, tasks: int) -> list[int]:
        """Rounds of each of so many tasks.

        Raises:
            UserError: a list for another number of tasks.
        """
        if isinstance(self._rounds, int):
            return [self._rounds] * tasks
        if len(self._rounds) != tasks:
            raise UserError(
                f"federation.rounds={list(self._rounds)} is of {len(self._rounds)} tasks, and there are {tasks}",
                hint="one number counts for all of them",
            )
        return list(self._rounds)

    def divide(self, examples: int, targets: Indices | None, task: int, seed: int) -> list[Indices]:
        """Numbers of the training examples of each client.

        Args:
            examples: of the task.
            targets: their labels (examples,), None where nobody knows them.
            task: its number.
            seed: of the run.
        """
        own = derive_key("task", task, self.seed(seed))
        return divide(self.partition, examples, targets, self.clients, own, shards=self.shards, alpha=self.alpha)

    def sample(self, round_index: int, seed: int, always: Sequence[int] = ()) -> list[int]:
        """Participants of a round, ascending; `always` are among them.

        Args:
            round_index: from 0, over the whole run.
            seed: of the run.
            always: clients that take part in every round.
        """
        if any(not 0 <= client < self.clients for client in always):
            raise UserError(f"method.target={max(always)}: expected 0 to {self.clients - 1}, the number of a client")
        generator = np.random.default_rng(derive_key("participants/1", self.seed(seed), round_index))
        others = np.setdiff1d(np.arange(self.clients), np.asarray(always, dtype=np.int64))
        wanted = max(0, self.participants - len(always))
        chosen = generator.choice(others, size=min(wanted, len(others)), replace=False)
        return sorted([*always, *map(int, chosen)])

    def seed(self, run_seed: int) -> int:
        """The seed of partition and participation."""
        return run_seed if self._seed is None else self._seed

    def describe(self, seed: int) -> dict[str, Any]:
        """What results.json records."""
        found: dict[str, Any] = {
            "clients": self.clients,
            "participants": self.participants,
            "partition": self.partition,
            "local": {"steps": self.local_steps} if self.local_steps else {"epochs": self.local_epochs},
            "server_momentum": self.server_momentum,
            "weighting": self.weighting,
            "engine": self.engine,
            "secure_aggregation": self.secure_aggregation,
            "seed": self.seed(seed),
        }
        if self.partition == "shards":
            found["shards"] = self.shards
        if self.partition == "dirichlet":
            found["alpha"] = self.alpha
        if self.byzantine:
            found |= {"byzantine": self.byzantine, "attack": self.attack}
        return found


def _participants(participation: float, clients: int) -> int:
    if 0 < participation <= 1:
        return max(1, round(participation * clients))
    if participation == int(participation) and 2 <= participation <= clients:
        return int(participation)
    raise UserError(
        f"federation.participation={participation:g}: expected a share in (0, 1], or 2 to {clients} of the clients"
    )
