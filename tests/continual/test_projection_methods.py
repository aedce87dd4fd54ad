"""GPM and SGP: the papers' equations, the contract, what is frozen, convolutions, every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contracts.continual import OPTIMIZERS, ContinualContract, learn, small_model, task, weights
from reference.gpm_literal import Memory, step, update
from timm.optim import Lion
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from subspace_lab.continual import layers
from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.projection import GPM, SGP
from subspace_lab.methods.continual.protecting import ProtectingMethod
from subspace_lab.models.task_heads import TaskHeads
from subspace_lab.optim.traits import OptimizerFactory


class TestGPM(ContinualContract):
    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return GPM(threshold)


class TestSGP(ContinualContract):
    """With a huge α all importances are 1: then it keeps GPM's promises."""

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return SGP(threshold, alpha=1e9)


@pytest.mark.parametrize("scaled", [False, True])
def test_four_tasks_equal_the_papers_equations(scaled: bool) -> None:
    method = SGP([0.8, 0.05], samples=None, alpha=3.0) if scaled else GPM([0.8, 0.05], samples=None)
    model = method.prepare(small_model().double())
    W = [p.detach().clone() for p in model.parameters()]
    memories: list[Memory | None] = [None] * 3
    for index in range(4):
        now = task(index, 4)
        batches = list(now.batches(batch_size=10))
        batches = [{"inputs": b["inputs"].double(), "labels": b["labels"]} for b in batches]
        method.install(model, index)
        optimizer = method.build_optimizer(model, OPTIMIZERS["sgd"])
        for batch in batches * 2:
            optimizer.zero_grad()
            cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
            optimizer.step()
            grads = torch.autograd.grad(cross_entropy(_mlp(W_ := _leaves(W), batch["inputs"])[-1], batch["labels"]), W_)
            W = [step(w, g, m, 0.05, scaled) for w, g, m in zip(W, grads, memories, strict=True)]
        everything = torch.cat([b["inputs"] for b in batches])
        inputs = _mlp(W, everything)
        memories = [update(R.T, memory, 0.8 + 0.05 * index, 3.0) for R, memory in zip(inputs, memories, strict=False)]
        object.__setattr__(now, "batches", lambda batches=batches, **_: iter(batches))
        method.end_task(model, now)
        for (path, M), memory in zip(method.memory.items(), memories, strict=True):
            assert memory is not None and M.shape == memory.M.shape, (index, path)
            torch.testing.assert_close(M @ M.T, (memory.M @ memory.M.T).float(), atol=2e-6, rtol=0)
            if scaled:
                torch.testing.assert_close(method.importance[path], memory.importance.float(), atol=1e-5, rtol=0)
    for p, w in zip(model.parameters(), W, strict=True):
        torch.testing.assert_close(p.detach(), w, atol=2e-6, rtol=0)


def _leaves(W: list[Tensor]) -> list[Tensor]:
    return [w.clone().requires_grad_() for w in W]


def _mlp(W: list[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs of every layer, and the outputs."""
    found = [x]
    for i, w in enumerate(W):
        x = x @ w.T
        x = x.tanh() if i < len(W) - 1 else x
        found.append(x)
    return found


# -- the applied update ----------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Convolutions with and without a batch norm, linear layers with biases, one head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2)
        self.fc = nn.Linear(4 * 3 * 3, 60)
        self.heads = TaskHeads(60, [3, 3, 3])

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(torch.relu(self.norm(self.conv1(x)))).flatten(1)
        return self.heads(torch.relu(self.fc(h)))


def pictures(index: int) -> TaskContext:
    """A task of 8×8 pictures of two channels, with few examples, so that bases stay small."""
    generator = torch.Generator().manual_seed(50 + index)
    x, y = torch.randn(24, 2, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)

    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Any]:
        for part in torch.arange(24)[:count].split(batch_size or 24):
            yield {"inputs": x[part], "labels": y[part]}

    return replace(
        task(index),
        head="task",
        columns=range(3 * index, 3 * index + 3),
        batches=batches,
        loss=lambda model, batch: cross_entropy(model(batch["inputs"])[:, 3 * index : 3 * index + 3], batch["labels"]),
    )


def after_one_task(threshold: float = 0.6, **options: Any) -> tuple[ProtectingMethod, Tower]:
    method = SGP(threshold, samples=12, **options) if options else GPM(threshold, samples=12)
    model = method.prepare(Tower())
    assert isinstance(model, Tower)
    model.heads.train_only(range(0, 1))
    learn(method, model, pictures(0), OPTIMIZERS["sgd"], steps=4)
    method.end_task(model, pictures(0))
    model.heads.train_only(range(1, 2))
    return method, model


MORE: dict[str, OptimizerFactory] = OPTIMIZERS | {
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05),
    "lion": partial(Lion, lr=0.003, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01, weight_decay=0.01),
    "muon": partial(torch.optim.Muon, lr=0.01),
}


@pytest.mark.parametrize("way", ["plain", "clipped", "accumulated", "bf16"])
@pytest.mark.parametrize("name", list(MORE))
def test_every_optimizer_every_way(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers._WORTH, "cpu", 0)  # small layers project their inputs too
    method, model = after_one_task()
    now = pictures(1)
    method.install(model, 1)
    factory = MORE[name]
    if name == "muon":  # matrices only
        model.requires_grad_(False)
        model.fc.weight.requires_grad_(True)
    before = weights(model)
    optimizer = method.build_optimizer(model, factory)
    model.fc.take_clean()
    for _ in range(4):
        optimizer.zero_grad()
        for batch in now.batches(batch_size=8 if way == "accumulated" else 24):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
                loss = now.loss(model, batch)
            loss.backward()
        assert not model.fc.pending["raw"]  # its gradient came projected, those of the convolutions did not
        if way == "clipped":
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2) > 1e-2
        optimizer.step()
    for path in ("fc",) if name == "muon" else ("conv1", "conv2", "fc"):
        D = (weights(model)[f"{path}.weight"] - before[f"{path}.weight"]).flatten(1).double()
        M = method.memory[path].double()
        rounding = torch.finfo(torch.float32).eps * before[f"{path}.weight"].norm()
        assert M.shape[1] and D.norm() > 100 * rounding, path
        assert (D @ M).norm() <= 1e-5 * D.norm() + rounding, path


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_importance_scales_every_step(name: str) -> None:
    """One step of any optimizer moves along m_i by (1 − λ_i) of what it would."""
    method, model = after_one_task(0.9, alpha=2.0)
    method.install(model, 1)
    batch = next(pictures(1).batches())
    before, moved = weights(model), []
    for inside in (True, False):
        model.load_state_dict(before, strict=False)
        optimizer = method.build_optimizer(model, MORE[name]) if inside else MORE[name]([*model.parameters()])
        if not inside:
            for layer in method.layers.values():
                if isinstance(layer, layers.ProtectedLinear):
                    layer.protect(None)
        optimizer.zero_grad()
        pictures(1).loss(model, batch).backward()
        optimizer.step()
        moved.append({k: (v - before[k]).flatten(1) for k, v in weights(model).items() if v.ndim > 1})
    for path in ("conv1", "conv2", "fc"):
        scaled, whole = (m[f"{path}.weight"] for m in moved)
        M, weight = method.memory[path], method.importance[path]  # type: ignore[attr-defined]
        assert 0 < weight.min() < 0.99 and weight.max() <= 1
        torch.testing.assert_close(scaled, whole - whole @ (M * weight) @ M.T, atol=1e-6, rtol=1e-4)


# -- what does not move ----------------------------------------------------------------------------------------------


def test_everything_unprotected_is_frozen_after_the_first_task() -> None:
    method, model = after_one_task()
    twin = copy.deepcopy(model)
    before, statistics = weights(model), model.norm.running_mean.clone()
    learn(method, model, pictures(1), OPTIMIZERS["adamw"], steps=4)
    changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed == {"conv1.weight", "conv2.weight", "fc.weight", "heads.heads.1.weight", "heads.heads.1.bias"}
    model.train()
    model(torch.randn(4, 2, 8, 8))
    assert torch.equal(model.norm.running_mean, statistics)
    assert len(model.norm._forward_pre_hooks) == 1  # installed twice, held once
    twin.train()
    twin(torch.randn(4, 2, 8, 8))
    assert not torch.equal(twin.norm.running_mean, statistics)  # in the first task they move


def test_single_heads_are_protected_too() -> None:
    method = GPM()
    model = method.prepare(small_model(bias=True))
    assert list(method.layers) == ["0", "2", "4"]
    learn(method, model, task(0), OPTIMIZERS["sgd"])
    method.end_task(model, task(0))
    method.install(model, 1)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight", "2.weight", "4.weight"]


def test_unprotected_layers_are_frozen_and_other_processes_get_the_bases() -> None:
    method = SGP(targets=["^0$"])
    model = method.prepare(small_model())
    learn(method, model, task(0), OPTIMIZERS["sgd"])
    handed: dict[str, Tensor] = {}
    method.end_task(model, replace(task(0), share=lambda t: handed.update(t) or t))
    method.install(model, 1)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
    other = SGP(targets=["^0$"])
    twin = other.prepare(small_model())
    other.end_task(twin, replace(task(0), leads=False, share=lambda nothing: handed))
    assert other.ranks() == method.ranks() and torch.equal(other.memory["0"], method.memory["0"])
    assert torch.equal(other.importance["0"], method.importance["0"])


def test_options_out_of_range_are_named() -> None:
    for wrong, told in (
        (lambda: GPM(1.2), "threshold"),
        (lambda: GPM(samples=0), "samples"),
        (lambda: SGP(alpha=-1), "alpha"),
        (lambda: GPM(targets=["nothing"]).prepare(small_model()), "targets"),
        (lambda: GPM({"^0": 0.9}).prepare(small_model()), "layer 2"),
    ):
        with pytest.raises(UserError, match=told):
            wrong()
