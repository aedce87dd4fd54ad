"""What the server and the clients say to each other in Flower's messages, and secure sums; no process but this one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from federated.flower_clients import ArithmeticClients, arithmetic
from federated.flower_grid import LocalGrid
from flwr.app import ConfigRecord, RecordDict
from omegaconf import OmegaConf

from subspace_lab.errors import UserError
from subspace_lab.federated.exchange import InProcess, Question, Work
from subspace_lab.federated.flower import masking, secure_server
from subspace_lab.federated.flower.app import client_app
from subspace_lab.federated.flower.exchange import FlowerExchange
from subspace_lab.federated.flower.records import pack, unpack

WORK = Work(task=2, round=17, lr_scale=0.3)


def connected(clients: int, secure: bool = False, config: dict[str, Any] | None = None, **options: Any) -> Any:
    cfg = OmegaConf.create(config or {})
    grid = LocalGrid(client_app(OmegaConf.to_yaml(cfg), "cpu", arithmetic), clients, **options)
    exchange = FlowerExchange(grid, clients, secure=secure, patience=1.0)
    exchange.connect()
    return exchange, grid


def plain(config: dict[str, Any] | None = None) -> InProcess:
    return InProcess(ArithmeticClients(OmegaConf.create(config or {})))


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(501, generator=torch.Generator().manual_seed(3))


def test_every_bit_of_a_tensor_travels() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan")])
    tensors = {
        "values": values,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "none": torch.zeros(0, 3),
        "whole": torch.tensor([2**62 + 1, -1]),
    }
    back = unpack(pack(tensors))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


def test_replies_come_in_the_order_of_the_clients_and_are_those_of_one_process(weights: torch.Tensor) -> None:
    exchange, _ = connected(12, late=5)
    clients = [1, 2, 5, 7, 8, 11]
    replies = list(exchange.train(weights, clients, WORK))
    assert [client for client, _ in replies] == clients
    for (client, update), (other, wanted) in zip(replies, plain().train(weights, clients, WORK), strict=True):
        assert client == other and torch.equal(update, wanted)
    coefficients = [0.1, 0.2, 0.3, 0.05, 0.15, 0.2]
    torch.testing.assert_close(
        exchange.sum_train(weights, clients, WORK, coefficients),
        plain().sum_train(weights, clients, WORK, coefficients),
        rtol=0,
        atol=0,
    )


def test_questions_carry_their_tensors(weights: torch.Tensor) -> None:
    exchange, _ = connected(4)
    tensors = {"b": torch.randn(3, 4, dtype=torch.float64), "a": torch.randn(2)}
    answers = dict(exchange.ask(weights, [0, 3], Question("echo", 1, 5, tensors)))
    for client, answer in answers.items():
        assert list(answer) == ["weights", "b", "a", "client"] and answer["client"] == client
        assert torch.equal(answer["weights"], weights) and torch.equal(answer["b"], tensors["b"])
        assert answer["b"].dtype == torch.float64 and answer["a"].dtype == torch.float32


def test_a_client_that_fails_is_named_in_one_line(weights: torch.Tensor) -> None:
    exchange, _ = connected(6, config={"failing": [3], "refusing": [4]})
    with pytest.raises(
        UserError, match=r"^client 3: ZeroDivisionError: no examples \(flower_clients.py:\d+\)"
    ) as caught:
        list(exchange.train(weights, range(4), WORK))
    assert "\n" not in str(caught.value) and "inprocess" in str(caught.value)
    with pytest.raises(UserError, match=r"^client 4: this client has no data \(give it some\)$"):
        exchange.sum_train(weights, [0, 4], WORK, [0.5, 0.5])


def test_a_missing_reply_is_an_error_and_names_the_client(weights: torch.Tensor) -> None:
    exchange, _ = connected(6, silent=lambda client, kind: client == 2 and kind == "train")
    with pytest.raises(UserError, match=r"^client 2: no reply$"):
        exchange.sum_train(weights, range(6), WORK, [1 / 6] * 6)
    assert len(list(exchange.train(weights, [0, 1, 3], WORK))) == 3


def test_nodes_that_do_not_come_are_an_error() -> None:
    grid = LocalGrid(client_app("{}", "cpu", arithmetic), 4)
    with pytest.raises(UserError, match="4 of 5 Flower nodes are there after 0 s"):
        FlowerExchange(grid, 5).connect(timeout=0.1)
    with pytest.raises(UserError, match="expected the Flower nodes of clients 0 to 2, found 4"):
        FlowerExchange(grid, 3).connect()
    mute = LocalGrid(client_app("{}", "cpu", arithmetic), 3, silent=lambda client, kind: client == 1)
    with pytest.raises(UserError, match="does not say which client it is: no reply"):
        FlowerExchange(mute, 3).connect(timeout=0.2)


# -- secure sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [3, 10, 19])  # all with all, and a ring of neighbours
def test_secure_sums_are_the_sums(clients: int, weights: torch.Tensor) -> None:
    exchange, _ = connected(clients, secure=True)
    coefficients = np.random.default_rng(0).dirichlet(np.ones(clients)).tolist()
    chosen = list(range(clients))
    total = exchange.sum_train(weights, chosen, WORK, coefficients)
    assert total.dtype == torch.float64 and exchange.left_out == ()
    wanted = plain().sum_train(weights, chosen, WORK, coefficients)
    torch.testing.assert_close(total, wanted, rtol=0, atol=clients * 2.0**-37)
    question = Question("sketch", 0, 3, {"basis": torch.randn(3, 5)})
    totals, others = exchange.sum_ask(weights, chosen, question), plain().sum_ask(weights, chosen, question)
    assert list(totals) == list(others) and totals["sketch"].shape == (7, 5) and totals["count"].shape == ()
    for name, tensor in totals.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=clients * 2.0**-37)


def test_the_server_sees_nothing_but_masks(weights: torch.Tensor) -> None:
    exchange, grid = connected(5, secure=True)
    exchange.sum_train(weights, range(5), WORK, [0.2] * 5)
    exchange.sum_train(weights, range(5), WORK, [0.2] * 5)
    kinds = {kind for _, kind, _ in grid.seen}
    assert kinds == {"query.hello", "query.keys", "query.shares", "query.masked", "query.unmask"}
    vectors = [
        masking.from_tensor(unpack(reply.content.array_records["tensors"])["masked"])
        for _, kind, reply in grid.seen
        if kind == "query.masked"
    ]
    updates = [update for _, update in plain().train(weights, range(5), WORK)]
    for place, vector in enumerate(vectors):
        # Uniform words, although what they hide is small; and other ones for the same update the next time.
        top = (vector >> np.uint64(63)).astype(float).mean()
        assert 0.4 < top < 0.6
        assert not np.any(vector == masking.encode({"update": updates[place % 5]}, 0.2, 5))
    for first, second in itertools.combinations(vectors, 2):
        assert np.mean(first == second) < 0.01
    # Pairwise masks alone would leave the sum in the open: it must need the clients' shares as well.
    half = sum(vectors[1:5], start=vectors[0].copy())
    wanted = sum(masking.encode({"update": update}, 0.2, 5) for update in updates)
    assert not np.any(half == wanted)
    assert all("tensors" not in reply.content for _, kind, reply in grid.seen if kind != "query.masked")
    with pytest.raises(UserError, match="keeps secret"):
        list(exchange.train(weights, range(5), WORK))
    with pytest.raises(UserError, match="keeps secret"):
        list(exchange.ask(weights, range(5), Question("sketch", 0, 3, {"basis": torch.eye(3)})))


@pytest.mark.parametrize(("clients", "how"), [(10, "silent"), (19, "failing")])
def test_clients_that_drop_out_are_left_out_of_the_sum(
    clients: int, how: str, weights: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [2, 7, 8]
    if how == "silent":
        options: dict[str, Any] = {"silent": lambda client, kind: client in lost and kind == "query.masked"}
    else:
        options = {"config": {"failing": lost}}
    exchange, _ = connected(clients, secure=True, **options)
    coefficients = [(client + 1) / (clients * (clients + 1) / 2) for client in range(clients)]
    total = exchange.sum_train(weights, range(clients), WORK, coefficients)
    assert exchange.left_out == tuple(lost)
    there = [client for client in range(clients) if client not in lost]
    share = sum(coefficients[client] for client in there)
    wanted = plain().sum_train(weights, there, WORK, [coefficients[client] / share for client in there])
    torch.testing.assert_close(total, wanted, rtol=0, atol=clients * 2.0**-36)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: secure sum of {clients - 3} of {clients} clients: client 2: ")
    assert said.count("\n") == 1


def test_a_client_that_drops_out_at_the_end_is_in_the_sum(weights: torch.Tensor) -> None:
    exchange, _ = connected(6, secure=True, silent=lambda client, kind: client == 5 and kind == "query.unmask")
    total = exchange.sum_train(weights, range(6), WORK, [1 / 6] * 6)
    wanted = plain().sum_train(weights, range(6), WORK, [1 / 6] * 6)
    torch.testing.assert_close(total, wanted, rtol=0, atol=6 * 2.0**-37)


def test_too_few_for_a_secure_sum(weights: torch.Tensor) -> None:
    exchange, _ = connected(6, secure=True, config={"failing": [0, 1]})
    with pytest.raises(UserError, match=r"no secure sum: client 0: ZeroDivisionError.*\(and 1 more\)"):
        exchange.sum_train(weights, range(6), WORK, [1 / 6] * 6)
    with pytest.raises(UserError, match="needs 3 clients in a round, got 2"):
        exchange.sum_train(weights, [2, 3], WORK, [0.5, 0.5])
    exchange, _ = connected(6, secure=True, silent=lambda client, kind: client < 2 and kind == "query.unmask")
    with pytest.raises(UserError, match="no secure sum: client 0: no reply"):
        exchange.sum_train(weights, range(6), WORK, [1 / 6] * 6)
    exchange, _ = connected(4, secure=True, silent=lambda client, kind: client == 3 and kind == "query.keys")
    with pytest.raises(UserError, match="no secure sum: client 3: no reply"):
        exchange.sum_train(weights, range(4), WORK, [0.25] * 4)


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_numbers_that_do_not_fit_are_refused_instead_of_clipped(value: float, weights: torch.Tensor) -> None:
    exchange, _ = connected(4, secure=True)
    fits = exchange.sum_ask(weights, range(4), Question("huge", 0, 0, {"value": torch.tensor(2.0e7)}))
    assert torch.equal(fits["sum"], torch.full((3,), 8.0e7, dtype=torch.float64))
    with pytest.raises(UserError, match=r"takes numbers up to 2\.68e\+07 from each of 4 clients"):
        exchange.sum_ask(weights, range(4), Question("huge", 0, 0, {"value": torch.tensor(value)}))


def test_a_client_gives_away_neither_both_shares_nor_a_small_sum(weights: torch.Tensor) -> None:
    exchange, _ = connected(6, secure=True)
    asked: dict[str, list[int]] = {}

    def call(kind: str, orders: Any) -> Any:
        if kind == "query.unmask":
            orders = {client: RecordDict({"secure": ConfigRecord(dict(asked))}) for client in orders}
        return exchange._call(kind, orders)

    order = RecordDict({"weights": pack({"weights": weights}), "order": ConfigRecord({"task": 0, "round": 0})})
    for alive, gone, reason in (
        ([0, 1, 2, 3, 4], [4], "never told"),
        ([0, 1, 2, 3, 4, 5], [9], "never told"),
        ([0, 1, 2, 3], [4, 5], "would tell too much"),
    ):
        asked.update(alive=alive, gone=gone)
        with pytest.raises(UserError, match=reason):
            secure_server.secure_sum(call, order, dict.fromkeys(range(6), 1.0))
    # And only once: of the second answer the sum of fewer clients could be had.
    asked.update(alive=[0, 1, 2, 3, 4, 5], gone=[])
    secure_server.secure_sum(call, order, dict.fromkeys(range(6), 1.0))
    replies = dict(call("query.unmask", dict.fromkeys(range(6), RecordDict())))
    assert all("left out or came twice" in reply.message for reply in replies.values())


def test_neighbourhoods_are_symmetric_and_small() -> None:
    order = list(np.random.default_rng(1).permutation(60))
    near = masking.neighbourhoods([int(client) for client in order])
    assert {len(members) for members in near.values()} == {17}
    assert all(client in near[member] for client, members in near.items() for member in members)
    assert masking.threshold(17) == 12 and masking.threshold(3) == 3
