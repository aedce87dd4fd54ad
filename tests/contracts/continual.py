"""What every method must do that protects old tasks' inputs.  A new one inherits these tests by supplying `build`.

Tasks are small regressions to classes whose inputs lie in a few directions each, so that a basis can hold all of them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

from subspace_lab.continual.context import TaskContext
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.optim.traits import OptimizerFactory

WIDTH, CLASSES, EXAMPLES, SPAN = 20, 5, 60, 4

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}


def small_model(bias: bool = False) -> nn.Module:
    """20-16-16-5 with a single head; without biases, as the reference protocol has it."""
    torch.manual_seed(0)
    widths = [WIDTH, 16, 16, CLASSES]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def examples(index: int) -> tuple[Tensor, Tensor]:
    """Inputs (60, 20) in 4 directions and their classes."""
    generator = torch.Generator().manual_seed(100 + index)
    directions = torch.linalg.qr(torch.randn(WIDTH, SPAN, generator=generator))[0]
    x = torch.randn(EXAMPLES, SPAN, generator=generator) @ directions.T
    return x, (x @ torch.randn(WIDTH, CLASSES, generator=generator)).argmax(1)


def task(index: int, tasks: int = 3) -> TaskContext:
    """Task `index` of a sequence whose tasks share one head."""
    x, y = examples(index)

    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Any]:
        generator = torch.Generator().manual_seed(index)
        order = torch.arange(len(x)) if count is None else torch.randperm(len(x), generator=generator)[:count]
        for part in order.split(batch_size or 20):
            yield {"inputs": x[part], "labels": y[part]}

    return TaskContext(
        index=index,
        tasks=tasks,
        columns=range(CLASSES),
        head="single",
        device=torch.device("cpu"),
        seed=index,
        batches=batches,
        forward=lambda model, batch: model(batch["inputs"]),
        loss=lambda model, batch: cross_entropy(model(batch["inputs"]), batch["labels"]),
    )


def learn(
    method: ContinualMethod,
    model: nn.Module,
    now: TaskContext,
    factory: OptimizerFactory,
    steps: int = 20,
    watch: Callable[[], None] | None = None,
) -> None:
    """Train one task as the protocol does, batches of 10; `end_task` is left to the caller."""
    method.begin_task(model, now)
    method.install(model, now.index)
    model.train()
    optimizer = method.build_optimizer(model, factory)
    loader = now.batches(batch_size=10)
    for _ in range(steps):
        batch = next(loader, None)
        if batch is None:
            loader = now.batches(batch_size=10)
            batch = next(loader)
        optimizer.zero_grad()
        method.objective(model, batch, now.loss).backward()
        optimizer.step()
        method.after_step(optimizer)
        if watch is not None:
            watch()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def remember_everything(method: ContinualMethod, model: nn.Module, now: TaskContext) -> None:
    """End the task twice: the rule for a first task leaves its last direction out."""
    method.end_task(model, now)
    method.end_task(model, replace(now, index=now.index + 1))


class ContinualContract:
    """Subclass and implement `build`."""

    #: outputs for old inputs stay what they were when everything of them is protected
    keeps_outputs = True
    #: which side of ΔW (out, in) the bases are on
    side = "right"
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        """The method, protecting this share of energy: 0 protects nothing, 1 everything."""
        raise NotImplementedError

    def bases(self, method: ContinualMethod) -> dict[str, Tensor]:
        """Parameter name -> the basis that updates are orthogonal to."""
        return {f"{path}.weight": M for path, M in method.memory.items()}  # type: ignore[attr-defined]

    def start(self, threshold: float = 0.9) -> tuple[ContinualMethod, nn.Module]:
        method = self.build(threshold)
        return method, method.prepare(small_model())

    @pytest.mark.parametrize("name", list(OPTIMIZERS))
    def test_applied_updates_are_orthogonal_to_the_bases(self, name: str) -> None:
        if name not in self.optimizers:
            pytest.skip(f"{type(self).__name__} names the optimizers its method is made for, and {name} is not one")
        method, model = self.start()
        for index in range(3):
            before, bases = weights(model), self.bases(method)
            learn(method, model, task(index), OPTIMIZERS[name])
            for path, M in bases.items():
                D = weights(model)[path] - before[path]
                D = D.flatten(1) if self.side == "right" else D.flatten(1).mT
                assert D.norm() > 0, path
                assert (D @ M).norm() <= 1e-5 * D.norm(), path
            method.end_task(model, task(index))
        assert bases

    def test_bases_stay_orthonormal_and_are_reported(self) -> None:
        method, model = self.start()
        for index in range(4):
            learn(method, model, task(index, 4), OPTIMIZERS["sgd"], steps=5)
            method.end_task(model, task(index, 4))
            for path, M in self.bases(method).items():
                assert M.shape[1] <= M.shape[0]
                assert (M.mT @ M - torch.eye(M.shape[1])).abs().amax() <= 1e-5, path
        ranks = method.ranks()
        assert sorted(ranks.values()) == sorted(M.shape[1] for M in self.bases(method).values())
        assert max(ranks.values()) > 0
        assert method.basis_bytes() >= sum(M.numel() * M.element_size() for M in self.bases(method).values())

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_continues_bit_for_bit_from_its_state(self, name: str) -> None:
        if name not in self.optimizers:
            pytest.skip(f"{type(self).__name__} names the optimizers its method is made for, and {name} is not one")
        method, model = self.start()
        for index in range(2):
            learn(method, model, task(index), OPTIMIZERS[name])
            method.end_task(model, task(index))
        file = io.BytesIO()
        torch.save({"method": method.state_dict(), "model": model.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again, other = self.start()
        again.load_state_dict(saved["method"])
        again.install(other, 1)
        other.load_state_dict(saved["model"])
        for m, net in ((method, model), (again, other)):
            learn(m, net, task(2), OPTIMIZERS[name])
            m.end_task(net, task(2))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        for (path, M), N in zip(self.bases(method).items(), self.bases(again).values(), strict=True):
            assert torch.equal(M, N), path

    def test_without_protection_it_is_naive_bit_for_bit(self) -> None:
        method, model = self.start(0.0)
        plain, twin = ContinualMethod(), small_model()
        for index in range(2):
            for m, net in ((method, model), (plain, twin)):
                learn(m, net, task(index), OPTIMIZERS["momentum"])
                m.end_task(net, task(index))
        for a, b in zip(method.export(model).values(), twin.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_old_outputs_stay_and_others_change(self) -> None:
        if not self.keeps_outputs:
            return
        method, model = self.start(1.0)
        learn(method, model, task(0), OPTIMIZERS["sgd"])
        remember_everything(method, model, task(0))
        x, random = examples(0)[0], torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9))
        old, other = model(x).detach(), model(random).detach()
        learn(method, model, task(1), OPTIMIZERS["adamw"], steps=40)
        assert (model(x) - old).norm() <= 1e-4 * old.norm()
        assert (model(random) - other).norm() > 1e-2 * other.norm()

    def test_full_bases_freeze(self) -> None:
        method, model = self.start(1.0)
        learn(method, model, task(0), OPTIMIZERS["sgd"], steps=5)
        full = {"inputs": torch.eye(WIDTH) * 3, "labels": torch.zeros(WIDTH).long()}
        remember_everything(method, model, replace(task(0), batches=lambda **_: iter([full])))
        before = weights(model)
        learn(method, model, task(1), OPTIMIZERS["adamw"], steps=5)
        D = weights(model)["0.weight"] - before["0.weight"]
        assert D.norm() <= 1e-6 * before["0.weight"].norm()
