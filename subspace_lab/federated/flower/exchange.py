"""The server's side of Flower's messages. Imports flwr: only to be imported when the engine runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.federated.exchange import Exchange, Question, Work
from subspace_lab.federated.flower import secure_server
from subspace_lab.federated.flower.records import Failed, pack, unpack

_POLL_S = 0.02
_CONNECT_S = 600.0  # Ray and the imports of every worker, on a busy machine
_VALID_S = 30 * 86400.0  # Flower's own limit of 12 hours is less than some rounds


class FlowerExchange(Exchange):
    """Clients behind a Flower Grid.

    Args:
        grid: of the running ServerApp.
        clients: how many there are: the nodes with `partition-id` 0 to clients − 1.
        secure: sums come from secure aggregation, and single replies are refused.
        check: called while waiting; raises where replies cannot come any more.
        patience: seconds to wait for the replies to one message of the server; None: as long as it takes.

    Attributes:
        left_out: the clients that the last secure sum is without.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        *,
        secure: bool = False,
        check: Callable[[], None] = lambda: None,
        patience: float | None = None,
    ) -> None:
        self._grid, self._clients, self._secure = grid, clients, secure
        self._check, self._patience = check, patience
        self._nodes: dict[int, int] = {}  # of each client
        self.left_out: tuple[int, ...] = ()

    def connect(self, timeout: float = _CONNECT_S) -> None:
        """Wait for all nodes, and ask each which client it is: node numbers are random.

        Raises:
            UserError: they do not all come in time, or are not the clients that were expected.
        """
        deadline = time.monotonic() + timeout
        nodes = list(self._grid.get_node_ids())
        while len(nodes) < self._clients:
            self._wait(deadline, f"{len(nodes)} of {self._clients} Flower nodes are there after {timeout:.0f} s")
            nodes = list(self._grid.get_node_ids())
        found: dict[int, int] = {}
        for node, reply in self._replies("query.hello", {node: RecordDict() for node in nodes}, timeout):
            if isinstance(reply, Failed):
                raise UserError(f"a Flower node does not say which client it is: {reply.message}")
            found[cast(int, reply.config_records["hello"]["number"])] = node
        if sorted(found) != list(range(self._clients)) or len(nodes) != self._clients:
            raise UserError(
                f"expected the Flower nodes of clients 0 to {self._clients - 1}, found {len(nodes)} of {sorted(found)}"
            )
        self._nodes = found

    @override
    def train(self, weights: Tensor, clients: Sequence[int], work: Work) -> Iterator[tuple[int, Tensor]]:
        self._refuse_single()
        for client, tensors in self._ordered("train", clients, _order(weights, work)):
            yield client, tensors["update"].to(weights.device)

    @override
    def ask(
        self, weights: Tensor, clients: Sequence[int], question: Question
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        self._refuse_single()
        for client, tensors in self._ordered("query.ask", clients, _order(weights, question)):
            yield client, {name: tensor.to(weights.device) for name, tensor in tensors.items()}

    @override
    def sum_train(self, weights: Tensor, clients: Sequence[int], work: Work, coefficients: Sequence[float]) -> Tensor:
        """As of every exchange; without clients that dropped out of a secure sum, the others' coefficients grow."""
        if not self._secure:
            return super().sum_train(weights, clients, work, coefficients)
        shares = dict(zip(clients, coefficients, strict=True))
        total = self._secure_sum(_order(weights, work), shares)["update"]
        there = sum(share for client, share in shares.items() if client not in self.left_out)
        return total.to(weights.device).mul_(sum(coefficients) / there)

    @override
    def sum_ask(self, weights: Tensor, clients: Sequence[int], question: Question) -> dict[str, Tensor]:
        """As of every exchange; a secure sum is without the clients that dropped out of it."""
        if not self._secure:
            return super().sum_ask(weights, clients, question)
        totals = self._secure_sum(_order(weights, question), dict.fromkeys(clients, 1.0))
        return {name: total.to(weights.device) for name, total in totals.items()}

    def _secure_sum(self, order: RecordDict, coefficients: Mapping[int, float]) -> dict[str, Tensor]:
        totals, gone = secure_server.secure_sum(self._call, order, coefficients)
        self.left_out = tuple(gone)
        if gone:
            told = "; ".join(f"client {client}: {failed.message}" for client, failed in gone.items())
            there = len(coefficients) - len(gone)
            print(f"warning: secure sum of {there} of {len(coefficients)} clients: {told}", file=sys.stderr)
        return totals

    def _refuse_single(self) -> None:
        if self._secure:
            raise UserError(
                "this needs every client's reply by itself, which federation.secure_aggregation=true keeps secret",
                hint="federation.secure_aggregation=false, or a method that needs sums alone, such as fedavg or fot",
            )

    def _ordered(self, kind: str, clients: Sequence[int], order: RecordDict) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The replies in the order of `clients`, each as soon as it and those before it are there."""
        waiting: dict[int, RecordDict] = {}
        following = iter(clients)
        due = next(following, None)
        for client, reply in self._call(kind, dict.fromkeys(clients, order)):
            if isinstance(reply, Failed):
                raise UserError(f"client {client}: {reply.message}", hint=reply.hint or None)
            waiting[client] = reply
            while due is not None and due in waiting:
                yield due, unpack(waiting.pop(due).array_records["tensors"])
                due = next(following, None)

    def _call(self, kind: str, orders: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict]]:
        """Send clients their orders; gives the reply of each, or a `Failed`, in the order in which they come."""
        clients = {self._nodes[client]: client for client in orders}
        by_node = {self._nodes[client]: order for client, order in orders.items()}
        for node, reply in self._replies(kind, by_node, self._patience):
            yield clients[node], reply

    def _replies(
        self, kind: str, orders: Mapping[int, RecordDict], patience: float | None
    ) -> Iterator[tuple[int, RecordDict]]:
        waiting: dict[str, int] = {}  # the node of each message; a message that the grid does not take gets no number
        for node, order in orders.items():
            numbers = self._grid.push_messages([Message(order, node, kind, ttl=_VALID_S)])
            waiting.update((number, node) for number in numbers)
        lost = set(orders) - set(waiting.values())
        deadline = None if patience is None else time.monotonic() + patience
        while waiting and (deadline is None or time.monotonic() < deadline):
            for message in self._grid.pull_messages(list(waiting)):
                yield waiting.pop(message.metadata.reply_to_message_id), _content(message)
            if waiting:
                self._check()
                time.sleep(_POLL_S)
        for node in [*lost, *waiting.values()]:
            yield node, Failed("no reply")

    def _wait(self, deadline: float, problem: str) -> None:
        self._check()
        if time.monotonic() > deadline:
            raise UserError(
                problem, hint="is the machine overloaded? federation.engine=inprocess needs no other process"
            )
        time.sleep(_POLL_S)


def _content(message: Message) -> RecordDict:
    if message.has_error():
        return Failed(f"Flower lost it ({(message.error.reason or 'no reason given').strip().splitlines()[0]})")
    if "error" in message.content:
        error = message.content.config_records["error"]
        return Failed(str(error["message"]), str(error["hint"]))
    return message.content


def _order(weights: Tensor, about: Work | Question) -> RecordDict:
    values: dict[str, Any] = {field.name: getattr(about, field.name) for field in fields(about)}
    tensors = values.pop("tensors", None)
    order = RecordDict({"weights": pack({"weights": weights}), "order": ConfigRecord(values)})
    if tensors is not None:
        order["tensors"] = pack(tensors)
    return order
