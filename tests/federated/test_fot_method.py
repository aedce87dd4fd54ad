"""Federated orthogonal training: sums over clients, energies, the constraint on what is applied, the literal paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import fot_literal
from torch import Tensor, nn

from subspace_lab.app import compose_config
from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.federated.client import ClientPool
from subspace_lab.federated.exchange import InProcess, Question, Work
from subspace_lab.federated.sketches import InputSketch, new_directions, remaining_threshold
from subspace_lab.linalg.random import derive_key
from subspace_lab.methods.federated.fot import FOT

CLIENTS, EXAMPLES, WIDTH = 4, 30, 12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(client: int, task: int = 0) -> Tensor:
    """(30, 12) of falling spectrum, along other directions in every task."""
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator(50 + task)))[0]
    return torch.randn(EXAMPLES, WIDTH, generator=generator(client)) * 0.6 ** torch.arange(WIDTH) @ turned


def network(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 10, bias=bias), nn.ReLU(), nn.Linear(10, 5, bias=bias))


def context(client: int, task: int = 0) -> TaskContext:
    x = inputs(client, task)

    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "") -> Iterator[Any]:
        yield {"inputs": x, "labels": torch.zeros(len(x), dtype=torch.int64)}

    return TaskContext(
        index=task,
        tasks=3,
        columns=range(5),
        head="single",
        device=torch.device("cpu"),
        seed=1000 * task + client,
        batches=batches,
        forward=lambda model, batch: model(batch["inputs"]),
        loss=lambda model, batch: model(batch["inputs"]).sum(),
    )


def finish(method: FOT, model: nn.Module, task: int, clients: list[int]) -> None:
    def gather(name: str, tensors: Any) -> dict[str, Tensor]:
        answers = [method.answer(name, tensors, model, context(client, task)) for client in clients]
        return {key: sum(answer[key].double() for answer in answers) for key in answers[0]}  # type: ignore[misc]

    method.finish_task(gather, task)


def learned(tasks: int = 1, **arguments: Any) -> tuple[FOT, nn.Module]:
    method = FOT(**arguments)
    model = method.prepare(network())
    for task in range(tasks):
        finish(method, model, task, list(range(CLIENTS)))
    return method, model


def test_grams_and_sketches_of_clients_add_up_to_those_of_the_union() -> None:
    U = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator(9)))[0].double()
    every = torch.cat([inputs(client) for client in range(CLIENTS)]).double()
    grams = [InputSketch(U, None, generator(0)) for _ in range(CLIENTS)]
    sketches = [InputSketch(U, 40, generator(client)) for client in range(CLIENTS)]
    for client in range(CLIENTS):
        grams[client].add(inputs(client).double())
        sketches[client].add(inputs(client).double())
    rest = every - every @ U @ U.T
    total = sum(gram.Y for gram in grams)
    torch.testing.assert_close(total, rest.T @ rest, rtol=0, atol=1e-10)
    G = torch.cat([torch.randn(EXAMPLES, 40, generator=generator(client)) for client in range(CLIENTS)])
    torch.testing.assert_close(sum(sketch.Y for sketch in sketches), rest.T @ G.double(), rtol=0, atol=1e-10)
    energies = sum(sketch.energies_of(EXAMPLES) for sketch in sketches)
    assert float(energies[0]) == pytest.approx(float(every.square().sum()), rel=1e-12)
    assert float(energies[1]) == pytest.approx(float(rest.square().sum()), rel=1e-12)
    assert float(energies[2]) == CLIENTS * EXAMPLES


def test_a_sketch_streamed_in_pieces_is_the_same() -> None:
    x = inputs(0)
    whole, pieces = (InputSketch(torch.zeros(WIDTH, 0), 24, generator(3)) for _ in range(2))
    whole.add(x)
    for piece in x.split(10):
        pieces.add(piece)
    torch.testing.assert_close(whole.Y, pieces.Y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [5.0, None])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
def test_the_captured_energy_reaches_the_threshold(width: float | None, threshold: float) -> None:
    """Exactly with Gram matrices, but for a tolerance with sketches; an unsquared ratio would keep far more."""
    method = FOT(threshold=threshold, sketch_width=width)
    model = method.prepare(network())
    for task in range(2):
        finish(method, model, task, list(range(CLIENTS)))
        every = torch.cat([inputs(client, task) for client in range(CLIENTS)]).double()
        U = method.memory["0"].double()
        assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-5
        captured = float((every @ U).square().sum() / every.square().sum())
        assert captured >= threshold - (0 if width is None else 0.02)
        smaller = U[:, :-1]  # one direction less is too few
        assert float((every @ smaller).square().sum() / every.square().sum()) < threshold + (0.02 if width else 0)


def test_the_ratio_is_of_energies() -> None:
    """The rest has .2 of the energy: for .95 of all, three quarters of it have to be captured; the norm says .888."""
    assert remaining_threshold(0.2, 0.95) == pytest.approx(0.75)
    assert remaining_threshold(0.2**0.5, 0.95) == pytest.approx(0.888, abs=1e-3)
    assert remaining_threshold(0.04, 0.95) < 0 and remaining_threshold(0.0, 0.95) == 0
    assert new_directions(torch.eye(4), -0.2, gram=True).shape == (4, 0)
    paper, release = FOT(), FOT(variant="release")
    energies = torch.tensor([10.0, 2.0, 30.0, 30.0 * 0.2**0.5], dtype=torch.float64)
    assert paper._ratio(energies) == pytest.approx(0.2)
    assert release._ratio(energies) == pytest.approx(0.2**0.5)


def test_the_release_adds_a_direction_even_where_none_is_needed() -> None:
    for variant, more in (("paper", 0), ("release", 1)):
        method = FOT(threshold=0.9, variant=variant, sketch_width=None)  # type: ignore[arg-type]
        model = method.prepare(network())
        finish(method, model, 0, [0, 1, 2, 3])
        before = method.ranks()["0"]
        finish(method, model, 0, [0, 1, 2, 3])  # the same inputs again
        assert method.ranks()["0"] == before + more


def test_the_order_of_clients_does_not_matter() -> None:
    methods = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        method = FOT()
        finish(method, method.prepare(network()), 0, order)
        methods.append(method)
    for path, U in methods[0].memory.items():
        V = methods[1].memory[path]
        torch.testing.assert_close(U @ U.T, V @ V.T, rtol=0, atol=1e-5)


def test_applied_updates_are_orthogonal_to_old_inputs() -> None:
    method, model = learned(2, threshold=0.9)
    update = {name: torch.randn(p.shape, generator=generator(7)) for name, p in model.named_parameters()}
    U = method.memory["0"]
    almost = torch.randn(10, U.shape[1], generator=generator(8)) @ U.T  # nearly all of it is taken out
    update["0.weight"] = almost + 1e-3 * update["0.weight"]
    method.constrain(update)
    for path, basis in method.memory.items():
        part = update[f"{path}.weight"]
        assert 0 < basis.shape[1] < basis.shape[0]
        assert (part @ basis).norm() <= 1e-5 * part.norm()
        assert part.norm() > 0
    inside = torch.randn(6, U.shape[1], generator=generator(2)) @ U.T
    assert (inside @ update["0.weight"].T).abs().max() < 1e-5
    assert (torch.randn(6, WIDTH, generator=generator(2)) @ update["0.weight"].T).abs().max() > 1e-4


def test_a_full_basis_freezes_the_weights_and_none_frees_them() -> None:
    full, model = learned(threshold=1.0, sketch_width=None)
    update = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    full.constrain(update)
    assert update["0.weight"].abs().max() < 1e-5
    free, model = learned(threshold=0.0)
    update = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in update.items()}
    free.constrain(update)
    assert all(torch.equal(update[name], before[name]) for name in before)
    assert free.ranks() == {"0": 0, "2": 0}


def rounds(pool: ClientPool, method: Any, count: int, tasks: int = 2) -> Tensor:
    """What the protocol does, without the command line."""
    exchange, w, layout = InProcess(pool), pool.layout.read(pool.model), pool.layout
    everyone = list(range(pool.federation.clients))
    for task in range(tasks):
        for index in range(count):
            work = Work(task, task * count + index)
            update = exchange.sum_train(w, everyone, work, [1 / len(everyone)] * len(everyone)).float()
            method.constrain(layout.named(update))
            w = w + update
        last = task * count + count - 1
        method.finish_task(
            lambda name, tensors, w=w, task=task, last=last: exchange.sum_ask(  # type: ignore[misc]
                w, everyone, Question(name, task, last, tensors)
            ),
            task,
        )
    return w


SMALL = ["federation.clients=4", "model.hidden=[16]", "scenario.tasks=2", "data.batch_size=100", "optimizer.lr=0.5"]


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_protected_is_federated_averaging_bit_for_bit(bias: bool) -> None:
    words = [*SMALL, f"model.bias={str(bias).lower()}"]
    free = ClientPool(compose_config(["method=fot", "method.threshold=0.0", *words]))
    plain = ClientPool(compose_config(["method=fedavg", *words]))
    assert torch.equal(rounds(free, free.method, 3), rounds(plain, plain.method, 3))
    tight = ClientPool(compose_config(["method=fot", *words]))
    assert not torch.equal(rounds(tight, tight.method, 3), rounds(plain, plain.method, 3))


def test_two_tasks_as_the_paper_writes_them() -> None:
    """The whole run, weights and bases, beside a literal transcription in float64."""
    pool = ClientPool(compose_config(["method=fot", "model.bias=false", *SMALL]))
    method, start = pool.method, pool.layout.read(pool.model)
    assert isinstance(method, FOT)
    W = [start[part].view(shape).double() for part, shape in zip(pool.layout.parts, pool.layout.shapes, strict=True)]
    paths, bases = ["1", "3"], [None, None]
    for task in range(2):
        data = []
        pool.enter(task)
        for index in range(3):
            trained = []
            for client in range(4):
                batches = [
                    (b["inputs"].flatten(1).double(), b["labels"])
                    for b in pool._client_batches(client, Work(task, 3 * task + index))
                ]
                trained.append(fot_literal.local_training(W, batches, lr=0.5))
            W = fot_literal.aggregate(W, trained, bases)
        for client in range(4):
            plain = pool._examples.plain(pool.share(client, task))
            data.append(plain["inputs"].flatten(1).double())

        def random(client: int, layer: int, rows: int, task: int = task, W: list[Tensor] = W) -> Tensor:
            seed = pool._context(client, Question("sketch", task, 0)).seed
            d = W[layer].shape[1]
            made = torch.Generator().manual_seed(derive_key("fot/1", seed, paths[layer]))
            return torch.cat(  # in pieces of 256 rows, as inputs are streamed
                [torch.randn(min(256, rows - first), 5 * d, generator=made) for first in range(0, rows, 256)]
            ).double()

        bases = fot_literal.extend(W, data, bases, 0.95, random)  # type: ignore[assignment]
    found = rounds(pool, method, 3)
    expected = torch.cat([layer.reshape(-1) for layer in W])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert (found - start).abs().max() > 0.1
    for path, U in zip(paths, bases, strict=True):
        V = method.memory[path].double()
        assert U is not None and V.shape == U.shape
        torch.testing.assert_close(V @ V.T, U @ U.T, rtol=0, atol=1e-3)


def test_biases_stay_after_the_first_task_but_not_in_the_release() -> None:
    for variant, moves in (("paper", False), ("release", True)):
        pool = ClientPool(compose_config(["method=fot", f"method.variant={variant}", *SMALL]))
        w = pool.layout.read(pool.model)
        first = pool.layout.named(pool.train(w, [0], Work(0, 0))[0])["1.bias"]
        second = pool.layout.named(pool.train(w, [0], Work(1, 1))[0])["1.bias"]
        assert first.abs().max() > 0 and bool(second.abs().max() > 0) is moves


def test_state_survives_and_goes_on() -> None:
    method, model = learned(1)
    other = FOT()
    other.prepare(network())
    other.load_state_dict(method.state_dict())
    for now in (method, other):
        finish(now, model, 1, [0, 1, 2])
    assert method.ranks() == other.ranks()
    assert all(torch.equal(U, other.memory[path]) for path, U in method.memory.items())
    assert method.dimensions() == {"0": 12, "2": 10} and method.basis_bytes() > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"threshold": 1.5}, "method.threshold=1.5"),
        ({"sketch_width": 0.0}, "method.sketch_width=0"),
        ({"server_lr": 0.0}, "method.server_lr=0"),
        ({"targets": ["conv"]}, "conv"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        FOT(**arguments).prepare(network())


def test_fields_of_a_question_reach_the_client_unchanged() -> None:
    question = Question("sketch", 1, 7, {"0": torch.eye(2)}, lr_scale=0.5)
    assert question.work() == Work(1, 7, 0.5)
    assert dataclasses.replace(question, lr_scale=1.0).work().lr_scale == 1.0
