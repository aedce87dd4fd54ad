"""Sculpting subspaces: what is kept is kept under AdamW, ranks follow importance, plain weights throughout."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference import adaptive_svd_literal as literal
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from subspace_lab.continual.context import TaskContext
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.adaptive_svd import AdaptiveSVD, importances
from subspace_lab.subspaces.two_sided import TwoSided


class Net(nn.Module):
    """A convolution, wide, square and tall weights, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.wide = nn.Linear(20, 12)
        self.square = nn.Linear(12, 12)
        self.tall = nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        y: Tensor = self.tall(torch.tanh(self.square(torch.tanh(self.wide(h)))))
        return y


LAYERS = ("conv", "wide", "square", "tall")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 32, 2, 4, 4, generator=GENERATOR)
Y = torch.randn(3, 32, 16, generator=GENERATOR)


def context(index: int, **changes: Any) -> TaskContext:
    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Batch]:
        yield {"inputs": X[index][:count]}

    given: dict[str, Any] = {
        "index": index,
        "tasks": 3,
        "columns": range(16),
        "head": "single",
        "device": torch.device("cpu"),
        "seed": index,
        "batches": batches,
        "forward": lambda model, batch: model(batch["inputs"]),
        "loss": lambda model, batch: model(batch["inputs"]).mean(),
    }
    return TaskContext(**(given | changes))


def start(method: AdaptiveSVD, model: nn.Module, index: int, factory: Callable[..., Any]) -> torch.optim.Optimizer:
    method.begin_task(model, context(index))
    method.install(model, index)
    return method.build_optimizer(model, factory)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, task: int) -> None:
    optimizer.zero_grad()
    functional.mse_loss(model(X[task]), Y[task]).backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: model.get_parameter(f"{path}.weight").detach().flatten(1).double().clone() for path in LAYERS}


def leak(method: AdaptiveSVD, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest |U_hᵀ ΔW| or |ΔW V_h|, relative to |ΔW|."""
    worst = 0.0
    for path, (U, V) in method.pairs.items():
        D = after[path] - before[path]
        if D.norm() > 0:
            worst = max(worst, float((U.double().mT @ D).norm() / D.norm()), float((D @ V.double()).norm() / D.norm()))
    return worst


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.01, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_directions_stay_through_many_steps(name: str) -> None:
    method, model = AdaptiveSVD(mrr=0.2, trr=0.4), Net()
    optimizer = start(method, model, 0, OPTIMIZERS[name])
    assert not method.ranks()
    step(model, optimizer, 0)
    method.end_task(model, context(0))
    optimizer = start(method, model, 1, OPTIMIZERS[name])
    assert all(1 <= k < method.dimensions()[path] for path, k in method.ranks().items())
    before, frozen = weights(model), {n: p.clone() for n, p in model.state_dict().items() if "weight" not in n}
    for _ in range(200):
        step(model, optimizer, 1)
    after = weights(model)
    for path, (U, V) in method.pairs.items():
        assert (after[path] - before[path]).norm() > 0.05 * before[path].norm()
        scale = float(before[path].norm())
        assert (U.double().mT @ (after[path] - before[path])).abs().max() < 1e-6 * max(1, scale)
        assert ((after[path] - before[path]) @ V.double()).abs().max() < 1e-6 * max(1, scale)
        # The old triplets are still singular ones of the new weight.
        s = (U.double().mT @ before[path] @ V.double()).diagonal()
        torch.testing.assert_close(after[path] @ V.double(), U.double() * s, atol=1e-5, rtol=0)
    for n, value in frozen.items():
        assert torch.equal(value, model.state_dict()[n]), n


def test_projecting_the_gradient_alone_would_not_do() -> None:
    method, model = AdaptiveSVD(mrr=0.2, trr=0.4), Net()
    start(method, model, 0, OPTIMIZERS["adamw"])
    method.end_task(model, context(0))
    method.begin_task(model, context(1))
    method.install(model, 1)
    plain = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    before = weights(model)
    for _ in range(200):
        plain.zero_grad()
        functional.mse_loss(model(X[1]), Y[1]).backward()
        for path, (U, V) in method.pairs.items():
            p = model.get_parameter(f"{path}.weight")
            assert p.grad is not None
            G = p.grad.flatten(1)
            G = G - U @ (U.mT @ G)
            p.grad = (G - G @ V @ V.mT).view_as(p)
        plain.step()
    assert leak(method, before, weights(model)) > 0.1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_algorithm_written_out(decay: float) -> None:
    method, model = AdaptiveSVD(mrr=0.1, trr=0.5, targets=["wide", "square"]), Net()
    factory = partial(AdamW, lr=0.01, weight_decay=decay)
    for task in range(3):
        before = copy.deepcopy(model)
        optimizer = start(method, model, task, factory)
        if task:
            by_hand = {}
            for path in ("wide", "square"):
                W = before.get_parameter(f"{path}.weight").detach().double().numpy()
                by_hand[path] = (W, literal.LiteralSculpting(W, method.ranks()[path], 0.01, decay))
            for _ in range(10):
                model.zero_grad()
                functional.mse_loss(model(X[task]), Y[task]).backward()
                for path, (W, rule) in by_hand.items():
                    grad = model.get_parameter(f"{path}.weight").grad
                    assert grad is not None
                    by_hand[path] = (rule.step(W, grad.double().numpy()), rule)
                optimizer.step()
            for path, (W, _) in by_hand.items():
                now = model.get_parameter(f"{path}.weight").detach().numpy()
                np.testing.assert_allclose(now, W, rtol=0, atol=2e-6)
        method.end_task(model, context(task))


def test_ranks_follow_importance_as_written_out() -> None:
    method, model = AdaptiveSVD(mrr=0.1, trr=0.8, targets=["wide", "square", "tall"], samples=20), Net()
    model.eval()
    seen: dict[str, Tensor] = {}
    for path in ("wide", "square", "tall"):
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen.__setitem__(path, x[0]))
    with torch.no_grad():  # importance that is positive and differs
        for path in ("wide", "square", "tall"):
            W = model.get_parameter(f"{path}.weight")
            W.add_({"wide": 0.3, "square": 1.0, "tall": 0.1}[path] * torch.eye(*W.shape))
        model(X[0][:20])
    measured, sizes = [], []
    for path, x in seen.items():
        W = model.get_parameter(f"{path}.weight").detach().double().numpy()
        measured.append(literal.importance(W, x.double().numpy()))
        sizes.append(min(W.shape))
    expected = literal.ranks(measured, sizes, 0.1, 0.8)
    found = importances(model, {p: model.get_submodule(p) for p in seen}, context(0), 20)
    np.testing.assert_allclose([found[p] for p in seen], measured, rtol=1e-5)
    method.end_task(model, context(0))
    method.begin_task(model, context(1))
    assert list(method.ranks().values()) == expected
    assert len(set(expected)) > 1
    method.importance = dict.fromkeys(method.importance, -0.2)  # no order among layers: the target for all
    method.begin_task(model, context(1))
    assert list(method.ranks().values()) == [round(0.8 * d) for d in sizes]


def test_release_keeps_a_growing_share_of_the_longer_side() -> None:
    method, model = AdaptiveSVD(variant="release", growth=0.25), Net()
    shares = []
    for task in range(4):
        method.begin_task(model, context(task))
        shares.append(method.ranks())
    assert shares[0] == {}
    assert shares[1] == {"conv": 4, "wide": 5, "square": 3, "tall": 4}
    assert shares[2] == {"conv": 5, "wide": 10, "square": 6, "tall": 8}
    assert shares[3] == {"conv": 5, "wide": 12, "square": 9, "tall": 12}


def test_a_fully_kept_weight_does_not_move_and_a_pretrained_model_is_kept_from_the_start() -> None:
    method, model = AdaptiveSVD(mrr=1.0, trr=1.0, pretrained=True), Net()
    optimizer = start(method, model, 0, OPTIMIZERS["adamw"])
    before = weights(model)
    for _ in range(3):
        step(model, optimizer, 0)
    assert all(torch.equal(before[path], after) for path, after in weights(model).items())


def test_factors_of_the_paper_move_in_the_same_space() -> None:
    rng = np.random.default_rng(0)
    W, G = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    U, _, Vh = np.linalg.svd(W, full_matrices=False)
    pair = (torch.tensor(U[:, :2]).float(), torch.tensor(Vh[:2].T).float())
    subspace = TwoSided({"w": pair}).allocate((1, 7, 5), names=["w"], device=torch.device("cpu"))
    D = torch.tensor(literal.factor_step(W, G, 2, 0.01) - W).float()
    torch.testing.assert_close(subspace.lift(D[None])[0], D, atol=1e-6, rtol=0)
    assert D.norm() > 1e-3


def test_weights_are_their_own_export_and_a_resume_goes_on_bit_for_bit() -> None:
    factory = partial(AdamW, lr=0.01)
    method, model = AdaptiveSVD(trr=0.4), Net()
    optimizer = start(method, model, 0, factory)
    step(model, optimizer, 0)
    method.end_task(model, context(0))
    optimizer = start(method, model, 1, factory)
    for _ in range(3):
        step(model, optimizer, 1)
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = AdaptiveSVD(trr=0.4), Net()
    again.load_state_dict(saved["method"])
    again.install(other, 1)
    again.install(other, 1)
    resumed = again.build_optimizer(other, factory)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert again.ranks() == method.ranks()
    for _ in range(3):
        step(model, optimizer, 1)
        step(other, resumed, 1)
    exported = Net()
    exported.load_state_dict(method.export(model))
    for net in (other, exported):
        assert torch.equal(net.eval()(X[2]), model.eval()(X[2]))


def test_all_processes_share_what_the_first_one_found() -> None:
    posted: dict[str, Tensor] = {}

    def send(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        posted.update(tensors)
        return tensors

    def receive(_: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in posted.items() if "/" in name} or dict(posted)

    def nothing(*_: Any, **__: Any) -> Iterator[Batch]:
        raise AssertionError("only the first process looks at data")

    first, second = AdaptiveSVD(), AdaptiveSVD()
    for task in range(2):
        posted.clear()
        first.begin_task(Net(), context(task, share=send))
        second.begin_task(Net(), context(task, leads=False, share=receive, batches=nothing))
        posted.clear()
        first.end_task(Net(), context(task, share=send))
        second.end_task(Net(), context(task, leads=False, share=receive, batches=nothing))
    assert first.importance == second.importance
    assert first.pairs.keys() == second.pairs.keys() == set(LAYERS)
    assert all(torch.equal(a, b) for p in LAYERS for a, b in zip(first.pairs[p], second.pairs[p], strict=True))


@pytest.mark.parametrize(
    "options", [{"mrr": -0.1}, {"mrr": 0.9}, {"trr": 0.0}, {"trr": 1.5}, {"growth": 0.0}, {"samples": 0}]
)
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(options))}"):
        AdaptiveSVD(**options)
