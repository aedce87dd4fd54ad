"""Training d numbers: SAID's budget, the learning-rate rule, the constraint, nestedness, plain algebra."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspace_lab.errors import UserError
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.subspaces.flat import FlatModel

KINDS = ("orthoblock", "fastfood", "fastfood_blocked", "dense", "gaussian", "sparse", "one_hot", "kronecker")
X = torch.linspace(-1, 1, 30 * 8).reshape(30, 8)
Y = torch.arange(30) // 10


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(**options: Any) -> tuple[IntrinsicDimension, FlatModel]:
    method = IntrinsicDimension(**options)
    return method, method.prepare(net())


@pytest.mark.parametrize("kind", KINDS)
def test_every_projection_trains(kind: str) -> None:
    method, model = build(d=40, projection=kind)
    losses = train(model, method.build_optimizer(model, partial(torch.optim.AdamW, lr=0.01)), 60)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
        partial(torch.optim.Adafactor, lr=10.0),  # relative to the RMS of z, which starts at 0
    ],
)
def test_the_update_stays_in_the_subspace_and_the_state_has_size_d(factory: Any) -> None:
    method, model = build(d=25, projection="orthoblock")
    optimizer = method.build_optimizer(model, factory)
    train(model, optimizer, 5)
    moved = (model.theta() - model.theta0()).double()
    P = model.projection.matrix(dtype=torch.float64)
    outside = moved - P @ torch.linalg.lstsq(P, moved[:, None]).solution[:, 0]
    assert moved.norm() > 1e-3
    assert outside.norm() <= 1e-5 * moved.norm()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert all(t.numel() <= 25 for t in held)


def test_gradient_of_z_is_P_transposed_times_the_gradient() -> None:
    _, model = build(d=12)
    plain = net()
    nn.functional.cross_entropy(plain(X), Y).backward()
    nn.functional.cross_entropy(model(X), Y).backward()
    grads = dict(plain.named_parameters())
    g = torch.cat([grads[name].grad.reshape(-1) for name in model.layout.names])  # type: ignore[union-attr]
    P = model.projection.matrix(dtype=torch.float64)
    assert torch.allclose(model.z.grad.double(), P.T @ g.double(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_equals_a_literal_transcription_of_the_paper() -> None:
    """θ = θ0 + Pz with P as a stored matrix and autograd through the product, in float64."""
    method, model = build(d=9, projection="dense")
    plain = net().double()
    order = model.layout.names
    theta0 = torch.cat([dict(plain.named_parameters())[n].detach().reshape(-1) for n in order])
    P = model.projection.matrix(dtype=torch.float64)
    z = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    rule = math.sqrt(len(theta0) / 9)
    literal = torch.optim.Adam([z], lr=0.003 * rule)
    ours = method.build_optimizer(model, partial(torch.optim.Adam, lr=0.003))
    for _ in range(12):
        theta = theta0 + P @ z
        parts = dict(zip(order, model.layout.split(theta), strict=True))
        h = X.double()
        for i in (0, 2, 4):
            h = h @ parts[f"{i}.weight"].T + parts[f"{i}.bias"]
            h = torch.tanh(h) if i < 4 else h
        literal.zero_grad()
        nn.functional.cross_entropy(h, Y).backward()
        literal.step()
        train(model, ours, 1)
    assert torch.allclose(model.z.double(), z, rtol=1e-3, atol=1e-5)


def test_learning_rate_follows_the_square_root_rule() -> None:
    method, model = build(d=10, lr_factor=3.0)
    optimizer = method.build_optimizer(model, partial(torch.optim.SGD, lr=0.1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 3 * math.sqrt(model.layout.D / 10))
    method, model = build(d=10, lr=0.7)
    assert method.build_optimizer(model, partial(torch.optim.SGD, lr=0.1)).param_groups[0]["lr"] == 0.7


def test_said_spends_one_number_per_layer_of_its_budget() -> None:
    method, model = build(d=10, variant="said")
    assert model.lambdas is not None
    assert (model.z.numel(), model.lambdas.numel()) == (7, 3)
    assert torch.equal(model.lambdas, torch.ones(3)) and not model.z.any()
    optimizer = method.build_optimizer(model, partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1))
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    losses = train(model, optimizer, 40)
    assert losses[-1] < losses[0] and not torch.equal(model.lambdas, torch.ones(3))
    two_layers = IntrinsicDimension(d=10, variant="said", targets=["^0", "^2"]).prepare(net())
    assert two_layers.lambdas is not None and two_layers.lambdas.numel() == 2
    with pytest.raises(UserError, match="3 numbers on the scales"):
        build(d=3, variant="said")


def test_nested_subspaces_give_the_same_weights() -> None:
    _, small = build(d=10, d_max=64)
    _, large = build(d=33, d_max=64)
    with torch.no_grad():
        small.z.copy_(torch.linspace(-1, 1, 10))
        large.z[:10] = small.z
    assert small.theta().numpy().tobytes() == large.theta().numpy().tobytes()
    assert not torch.equal(build(d=10, d_max=16)[1].projection.matrix(), small.projection.matrix())


def test_seed_is_the_projections() -> None:
    one, same, other = (build(d=5, seed=s)[1].projection.matrix() for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "method.d has no value"),
        ({"d": 0}, "at least 1"),
        ({"d": 10**6}, "more than the D=663"),
        ({"d": 20, "d_max": 10}, "less than"),
        ({"d": 5, "lr": -1.0}, "positive"),
        ({"d": 2, "scope": "per_layer"}, "layer"),
    ],
)
def test_wrong_options_are_told_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(**options)


def test_toy_problem_of_the_paper_has_dimension_ten() -> None:
    """Li et al., section 2: D = 1000, ten groups of 100 that must sum to 1 … 10, performance exp(−loss)."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(1000))

        def forward(self) -> Tensor:
            return (self.theta.view(10, 100).sum(1) - torch.arange(1.0, 11.0)).square().mean()

    def performance(d: int) -> float:
        model = IntrinsicDimension(d=d, d_max=64, projection="dense").prepare(Toy())
        optimizer = torch.optim.LBFGS([model.z], lr=1, max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return math.exp(-float(model().detach()))

    assert performance(9) < 0.9
    assert all(performance(d) > 0.99 for d in (10, 12, 20, 50))


def _rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    method, model = build(d=20)
    ddp = DistributedDataParallel(model)
    optimizer = method.build_optimizer(model, partial(torch.optim.SGD, lr=0.01))
    half = slice(15 * rank, 15 * rank + 15)
    nn.functional.cross_entropy(ddp(X[half]), Y[half]).backward()
    optimizer.step()
    sent = ddp._get_ddp_logging_data()["total_parameter_size_bytes"]
    torch.save({"z": model.z.detach(), "theta": model.theta(), "sent": sent}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_exchange_d_numbers_and_agree_with_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["theta"].numpy().tobytes() == second["theta"].numpy().tobytes()
    assert first["sent"] == 4 * 20
    method, model = build(d=20)
    train(model, method.build_optimizer(model, partial(torch.optim.SGD, lr=0.01)), 1)
    assert torch.allclose(model.z, first["z"], rtol=1e-5, atol=1e-7)
