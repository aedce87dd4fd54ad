"""O-LoRA: the loss and its descent as written out, overlaps that the penalty lowers, plain weights in the end."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference.o_lora_literal import LiteralOLoRA
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from subspace_lab.continual.context import TaskContext
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.o_lora import OLoRA, adapters
from subspace_lab.models.task_heads import TaskHeads


class Net(nn.Module):
    """A convolution, a layer whose path ends like a head's, batch norm, and one head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.mix = nn.Linear(36, 10)
        self.head = TaskHeads(10, [3, 3])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.mix(self.body(x))))
        return y


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 24, 2, 3, 3, generator=GENERATOR)
Y = torch.randint(0, 3, (2, 24), generator=GENERATOR)


def context(index: int) -> TaskContext:
    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("O-LoRA gathers nothing from data")

    return TaskContext(
        index=index,
        tasks=2,
        columns=range(3 * index, 3 * index + 3),
        head="task",
        device=torch.device("cpu"),
        seed=17 + index,
        batches=nothing,
        forward=nothing,
        loss=nothing,
    )


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def begin(method: OLoRA, model: nn.Module, index: int) -> None:
    head = model.head
    assert isinstance(head, TaskHeads)
    head.active = range(index, index + 1)
    head.train_only(head.active)
    method.begin_task(model, context(index))
    method.install(model, index)


def step(method: OLoRA, model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    method.objective(model, {"inputs": X[index], "labels": Y[index]}, task_loss).backward()
    optimizer.step()


@pytest.mark.parametrize("lambda2", [0.0, 0.1])
def test_equals_the_algorithm_written_out(lambda2: float) -> None:
    options: dict[str, Any] = {"lambda1": 0.5, "lambda2": lambda2}
    method = OLoRA(rank=2, alpha=4, dropout=0.0, targets=["mix"], **options)
    model = method.prepare(Net()).eval()
    layer = adapters(model)["mix"]
    literal = LiteralOLoRA(layer.base_layer.weight.detach().double().numpy(), scaling=2.0, lr=0.02, **options)
    for index in range(2):
        begin(method, model, index)
        literal.begin(layer.lora_A["default"].weight.detach().double().numpy())
        optimizer = method.build_optimizer(model, partial(SGD, lr=0.02))
        for _ in range(6):
            seen: dict[str, Tensor] = {}
            handles = [
                layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.__setitem__("x", x[0].detach())),
                layer.register_full_backward_hook(lambda _, __, g, seen=seen: seen.__setitem__("g", g[0])),
            ]
            assert float(method.penalty(model).detach()) == pytest.approx(literal.penalty(), rel=1e-4, abs=1e-6)
            step(method, model, optimizer, index)
            for handle in handles:
                handle.remove()
            literal.step((seen["g"].mT @ seen["x"]).double().numpy())
        np.testing.assert_allclose(layer.lora_A["default"].weight.detach(), literal.A, atol=1e-5)
        np.testing.assert_allclose(layer.lora_B["default"].weight.detach(), literal.B, atol=1e-5)
        method.end_task(model, context(index))
        literal.end()
        np.testing.assert_allclose(layer.base_layer.weight.detach(), literal.W, atol=1e-5)
    assert method.ranks() == {"mix": 4}
    assert method.dimensions() == {"mix": 36}
    assert method.basis_bytes() == 4 * 4 * 36


def overlap(method: OLoRA, model: nn.Module) -> float:
    """Largest |cos| between a row of A and an earlier one."""
    worst = 0.0
    for path, layer in adapters(model).items():
        old, new = (
            functional.normalize(A.detach().flatten(1)) for A in (method.old[path], layer.lora_A.default.weight)
        )
        worst = max(worst, float((old @ new.mT).abs().max()))
    return worst


def test_the_penalty_makes_adapters_orthogonal_and_nothing_else_does() -> None:
    found = {}
    for lambda1 in (0.0, 0.5):
        method = OLoRA(rank=3, alpha=6, lambda1=lambda1, dropout=0.0)
        model = method.prepare(Net())
        for index in range(2):
            begin(method, model, index)
            optimizer = method.build_optimizer(model, partial(Adam, lr=0.003))
            for _ in range(60):
                step(method, model, optimizer, index)
            if index == 0:
                method.end_task(model, context(0))
        found[lambda1] = overlap(method, model)
    assert found[0.5] < 0.15 < 0.3 < found[0.0]


def test_only_adapters_and_the_current_head_train_and_the_export_is_plain() -> None:
    method = OLoRA(rank=2)
    fresh = Net()
    names = list(fresh.state_dict())
    model = method.prepare(fresh)
    begin(method, model, 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n} == {"head.heads.0.weight", "head.heads.0.bias"}
    assert sorted(adapters(model)) == ["body.0", "mix"]
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n and "head" not in n}
    model.eval()
    untouched = Net().eval()
    untouched.head.active = range(1)
    torch.testing.assert_close(model(X[0]), untouched(X[0]))
    model.train()
    optimizer = method.build_optimizer(model, partial(Adam, lr=0.01))
    for _ in range(5):
        step(method, model, optimizer, 0)
    for n, value in before.items():
        assert torch.equal(value, model.state_dict()[n]), n  # running statistics too
    for ended in (False, True):
        if ended:
            method.end_task(model, context(0))
        exported = method.export(model)
        assert list(exported) == names
        plain = Net()
        plain.load_state_dict(exported)
        plain.head.active = range(1)
        torch.testing.assert_close(plain.eval()(X[0]), model.eval()(X[0]), atol=1e-5, rtol=1e-5)
        assert (exported["mix.weight"] - untouched.mix.weight).abs().max() > 1e-3


def test_a_resume_goes_on_bit_for_bit() -> None:
    def fresh() -> tuple[OLoRA, nn.Module]:
        method = OLoRA(rank=2, dropout=0.0)
        return method, method.prepare(Net())

    factory = partial(Adam, lr=0.01)
    method, model = fresh()
    for index in range(2):
        begin(method, model, index)
        optimizer = method.build_optimizer(model, factory)
        for _ in range(3):
            step(method, model, optimizer, index)
        if index == 0:
            method.end_task(model, context(0))
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)  # what PEFT draws at the start must not matter
    again, other = fresh()
    again.load_state_dict(saved["method"])
    other.head.active = range(1, 2)
    other.head.train_only(range(1, 2))  # type: ignore[operator]
    again.install(other, 1)
    again.install(other, 1)
    resumed = again.build_optimizer(other, factory)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(3):
        step(method, model, optimizer, 1)
        step(again, other, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_new_adapters_are_a_function_of_the_task_and_the_layer() -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        method = OLoRA(rank=2)
        model = method.prepare(Net())
        for index in range(2):
            begin(method, model, index)
            A = adapters(model)["mix"].lora_A["default"].weight.detach().clone()
            assert A.abs().max() <= 1 / 6 and A.std() == pytest.approx(1 / (3 * 36) ** 0.5, rel=0.25)
            drawn.append(A)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"lambda1": -0.1}, {"lambda2": -1.0}])
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(options))}|{next(iter(options))} must not be negative"):
        OLoRA(**options)
