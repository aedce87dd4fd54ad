"""What clients do: the same numbers alone, in any group, one by one or stacked."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from subspace_lab.app import compose_config
from subspace_lab.federated.client import ClientPool
from subspace_lab.federated.exchange import InProcess, Question, Work
from subspace_lab.federated.layout import Layout
from subspace_lab.federated.training import stackable

ALL = list(range(10))
SETTINGS = {
    "iid": (),
    "skewed": ("federation.partition=dirichlet", "federation.local_epochs=2", "optimizer.momentum=0.9"),
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0.1", "trainer.gradient_clip_val=1.0", "data.batch_size=32"),
    "steps": ("federation.local_steps=3", "data.batch_size=100"),
    "heads": ("data=split_digits",),
}


@functools.cache
def pool(*words: str) -> ClientPool:
    return ClientPool(compose_config(["method=fedavg", *words]))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_client_computes_the_same_in_every_company(name: str) -> None:
    """Bit for bit with SGD; norms and square roots are rounded differently in another place of a tensor."""
    clients = pool(*SETTINGS[name])
    w, work = clients.layout.read(clients.model), Work(1, 3)
    together = clients.train(w, ALL, work)
    alone, two = torch.cat([clients.train(w, [client], work) for client in ALL]), clients.train(w, [8, 2], work)
    if name == "adamw":
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)
    else:
        assert torch.equal(together, alone) and torch.equal(together[[8, 2]], two)
    assert together.abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_stacked_training_is_training(name: str) -> None:
    clients = pool(*SETTINGS[name])
    w, work = clients.layout.read(clients.model), Work(0, 2)
    stacked = clients.train(w, ALL, work)
    clients._stacks = False
    try:
        single = clients.train(w, ALL, work)
        assert [len(group) for group in clients.groups(ALL, 0)] == [1] * 10
    finally:
        clients._stacks = True
    torch.testing.assert_close(stacked, single, rtol=1e-4, atol=3e-6)
    assert sorted(client for group in clients.groups(ALL, 0) for client in group) == ALL


def test_what_the_server_sends_counts_also_where_nothing_is_trained() -> None:
    """Biases are frozen after the first task; a client that never saw them trained has to take the server's."""
    clients = ClientPool(compose_config(["method=fot", "model.hidden=[16]"]))
    w = clients.layout.read(clients.model)
    w[clients.layout.parts[1]] = 3.0  # the first layer's biases
    stacked = clients.train(w, [0, 1], Work(1, 0))
    clients._stacks = False
    torch.testing.assert_close(stacked, clients.train(w, [0, 1], Work(1, 0)), rtol=1e-4, atol=1e-5)


def test_a_round_and_a_client_decide_the_batches() -> None:
    clients = pool()
    w = clients.layout.read(clients.model)
    first, again, later = (clients.train(w, [0, 1], Work(0, k)) for k in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    half = clients.train(w, [0, 1], Work(0, 0, lr_scale=0.5))
    assert 0.4 < float(half.norm() / first.norm()) < 0.6


def test_dropout_is_the_clients_own() -> None:
    clients = ClientPool(compose_config(["method=fedavg", "model=fot_mlp", "model.hidden=[32,16,16]"]))
    assert not clients._stacks
    w, work = clients.layout.read(clients.model), Work(0, 0)
    together = clients.train(w, [0, 1, 2], work)
    torch.rand(5)  # whatever the process has drawn before
    assert torch.equal(together[1:2], clients.train(w, [1], work))


@pytest.mark.cuda
@pytest.mark.parametrize("words", [(), ("model=small_cnn",)])
def test_clients_and_sketches_on_a_gpu(words: tuple[str, ...]) -> None:
    """The same updates as on a CPU but for rounding, and Grams of the same inputs."""
    cfg = compose_config(["method=fot", "method.sketch_width=null", "federation.clients=4", *words])
    found = []
    for device in ("cpu", "cuda"):
        clients = ClientPool(cfg, device)
        w = clients.layout.read(clients.model)
        (answer,) = clients.answer(w, [1], Question("sketch", 0, 0))
        found.append((clients.train(w, [0, 1, 2], Work(0, 0)).cpu(), {k: v.cpu() for k, v in answer.items()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_single_steps_add_up_to_the_update() -> None:
    clients = pool("data.batch_size=50")
    w, work = clients.layout.read(clients.model), Work(0, 1)
    (answer,) = clients.answer(w, [4], Question("steps", 0, 1))
    assert len(answer["steps"]) == clients.steps(4, 0) == 3
    torch.testing.assert_close(answer["steps"].sum(0), clients.train(w, [4], work)[0], rtol=1e-4, atol=1e-6)


def test_sums_are_the_weighted_updates() -> None:
    clients = pool("federation.partition=shards")
    w, work = clients.layout.read(clients.model), Work(0, 0)
    shares = [0.1 * (k + 1) / 5.5 for k in ALL]
    total = InProcess(clients).sum_train(w, ALL, work, shares)
    assert total.dtype == torch.float64
    expected = sum(share * update.double() for share, update in zip(shares, clients.train(w, ALL, work), strict=True))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-9)


def test_layout_gives_back_what_it_took() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model[3].bias.requires_grad_(False)
    layout = Layout(model)
    assert layout.parameters == 3 * 8 + 3 + 3 + 3 + 48 and layout.size == layout.parameters + 6
    w = torch.randn(layout.size)
    layout.write(model, w)
    assert torch.equal(layout.read(model), w)
    assert torch.equal(layout.named(w)["3.weight"], model[3].weight)
    assert layout.named(torch.stack([w, w]))["0.weight"].shape == (2, 3, 2, 2, 2)
    assert not stackable(model) and stackable(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.0)))
    assert not stackable(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)))
