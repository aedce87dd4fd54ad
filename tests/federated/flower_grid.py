"""A Flower grid in this process: the real ClientApp and the real messages, without the simulation engine."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Runs every message at once and gives the replies in random order.

    `silent(client, kind, reply)` says which replies get lost; `seen` has all that the server received.
    """

    def __init__(
        self, app: Any, clients: int, silent: Callable[[int, str], bool] = lambda client, kind: False, late: int = 0
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.app, self.silent, self.late = app, silent, late
        nodes = random.Random(5).sample(range(2**40, 2**60), clients)
        self.contexts = {
            node: Context(7, node, {"partition-id": client, "num-partitions": clients}, RecordDict(), {})
            for client, node in enumerate(nodes)
        }
        self.waiting: dict[str, Message] = {}
        self.seen: list[tuple[int, str, Message]] = []

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        self.late -= 1  # nodes register one after the other
        nodes = list(self.contexts)
        return nodes[: len(nodes) - self.late] if self.late > 0 else nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            number = f"{len(self.seen)}-{random.random()}"
            message.metadata.__dict__["_message_id"] = number
            context = self.contexts[message.metadata.dst_node_id]
            kind, client = message.metadata.message_type, int(context.node_config["partition-id"])
            reply = self.app(pickle.loads(pickle.dumps(message)), context)
            numbers.append(number)
            if not self.silent(client, kind):
                self.waiting[number] = pickle.loads(pickle.dumps(reply))
                self.seen.append((client, kind, reply))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = [number for number in message_ids if number in self.waiting]
        random.shuffle(there)
        return [self.waiting.pop(number) for number in there[:4]]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError
