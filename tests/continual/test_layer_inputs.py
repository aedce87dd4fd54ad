"""Gathering layers' inputs, and linear layers that project them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_lab.continual import layers as layers_module
from subspace_lab.continual.activations import input_grams, input_rows, input_statistics, protected_layers
from subspace_lab.continual.layers import ProtectedLinear, replace_linear
from subspace_lab.errors import UserError
from subspace_lab.linalg.frequent_directions import FrequentDirections
from subspace_lab.linalg.removal import Removal
from subspace_lab.models.task_heads import TaskHeads

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1, "stride": 2},
]


def run(model: nn.Module, batch: Any) -> Any:
    return model(batch["inputs"])


def batches(*shape: int, count: int = 3) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield {"inputs": torch.randn(shape, generator=generator), "labels": torch.zeros(shape[0]).long()}


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_patches_are_what_the_weight_meets(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, bias=False, **options), torch.randn(2, 3, 9, 8)
    rows = torch.cat(list(input_rows(conv, x)))
    y = conv(x)
    torch.testing.assert_close(
        (rows @ conv.weight.flatten(1).T).reshape(2, -1, 5).mT.reshape_as(y), y, atol=1e-5, rtol=1e-5
    )


def test_grams_are_sums_over_all_batches_positions_and_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(36, 7), nn.Dropout(0.5)
    )
    model.append(nn.Linear(7, 3))
    model.train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    found = input_grams(model, protected_layers(model), batches(5, 2, 6, 6), run)
    assert list(found) == ["0", "3", "5"]
    assert [m.training for m in model] == [True, False, True, True, True, True]  # each its own mode again
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())  # no running statistics moved
    assert not any(m._forward_pre_hooks for m in model)
    X = torch.cat([b["inputs"] for b in batches(5, 2, 6, 6)])
    model.eval()
    patches = nn.functional.unfold(X, 3, padding=1).mT.reshape(-1, 18)
    torch.testing.assert_close(found["0"].float(), (patches.T @ patches), atol=1e-3, rtol=1e-4)
    h = model[2](model[1](model[0](X))).reshape(-1, 36)
    torch.testing.assert_close(found["3"].float(), h.T @ h, atol=1e-3, rtol=1e-4)
    assert found["3"].dtype == torch.float64


def test_large_inputs_are_sketched() -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 2))
    found = input_statistics(model, protected_layers(model), batches(9, 40), run, largest=20)
    sketch, gram = found["0"], found["1"]
    assert isinstance(sketch, FrequentDirections) and isinstance(gram, Tensor) and sketch.sketch is not None
    X = torch.cat([b["inputs"] for b in batches(9, 40)])
    torch.testing.assert_close(sketch.sketch[0].T @ sketch.sketch[0], X.T @ X, atol=1e-3, rtol=1e-4)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight
        self.heads = TaskHeads(8, [2, 2])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.linear(x))


def test_which_layers_can_be_protected() -> None:
    model = Odd()
    assert list(protected_layers(model)) == ["linear", "unused"]  # no heads, tied weights or insides of attention
    assert list(protected_layers(model, ["^lin"])) == ["linear"]
    with pytest.raises(UserError, match=r"linaer.*did you mean 'linear'"):
        protected_layers(model, ["linaer"])
    with pytest.raises(UserError, match="unused was not used"):
        input_grams(model, protected_layers(model), batches(3, 8), run)
    with pytest.raises(UserError, match="4 groups"):
        protected_layers(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    big = nn.Sequential(nn.Linear(9000, 1))
    with pytest.raises(UserError, match="9000 inputs"):
        input_grams(big, protected_layers(big), batches(1, 9000), run)


# -- projecting inputs -----------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers_module._WORTH, "cpu", 0)  # small layers too


def protected(k: int, out: int = 24, d: int = 16) -> tuple[ProtectedLinear, Tensor]:
    torch.manual_seed(2)
    layer = ProtectedLinear.of(nn.Linear(d, out))
    M = torch.linalg.qr(torch.randn(d, k))[0]
    layer.protect(Removal.of(M))
    return layer, M


@pytest.mark.parametrize("k", [4, 13])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,)])
def test_projected_inputs_give_the_projected_gradient(everywhere: None, k: int, shape: tuple[int, ...]) -> None:
    layer, M = protected(k)
    x, twin = torch.randn(shape, requires_grad=True), nn.Linear(16, 24)
    twin.load_state_dict(layer.state_dict())
    target = torch.randn(*shape[:-1], 24)
    assert not layer.take_clean()
    y = layer(x)
    assert torch.equal(y, twin(x))
    own = torch.autograd.grad((y * target).tanh().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((twin(x) * target).tanh().sum(), [x, *twin.parameters()])
    torch.testing.assert_close(own[0], theirs[0])
    torch.testing.assert_close(own[2], theirs[2])
    G = theirs[1] - theirs[1] @ M @ M.T
    assert (own[1] - G).norm() <= 1e-6 * G.norm()
    assert (own[1] @ M).norm() <= 2e-6 * own[1].norm()
    assert layer.take_clean()


def test_the_way_is_chosen_by_cost_and_told(everywhere: None) -> None:
    layer, M = protected(4)
    layer.take_clean()
    layer(torch.randn(23, 16)).sum().backward()
    assert layer.take_clean() and (layer.weight.grad @ M).norm() < 1e-4
    layer(torch.randn(24, 16)).sum().backward()  # as many rows as outputs: the gradient is cheaper
    assert not layer.take_clean() and (layer.weight.grad @ M).norm() > 1e-2
    layer(torch.randn(3, 16)).sum().backward()
    layer(torch.randn(30, 16)).sum().backward()
    assert not layer.take_clean()  # one plain gradient among projected ones
    assert layer.take_clean()
    x = torch.randn(3, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).tanh().sum(), [x], create_graph=True)
    slope.square().sum().backward()  # reaches the weight by way of the backward pass
    assert not layer.take_clean()
    layer.protect(None)
    layer(torch.randn(3, 16)).sum().backward()
    assert not layer.take_clean() and not layer.take_clean()


def test_bf16_autocast_stays_inside(everywhere: None) -> None:
    layer, M = protected(5)
    x = torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().sum()
    loss.backward()
    G = layer.weight.grad
    assert G is not None and G.dtype == torch.float32
    assert (G @ M).norm() <= 2e-6 * G.norm()
    with torch.autocast("cpu", torch.bfloat16):
        twin = nn.functional.linear(x, layer.weight, layer.bias)
    plain = torch.autograd.grad(twin.float().square().sum(), layer.weight)[0]
    torch.testing.assert_close(G, plain - plain @ M @ M.T, atol=0.3, rtol=0.05)


def test_replaced_layers_keep_names_weights_and_state() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"a": shared}), nn.Flatten())
    model.again = shared
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    model = replace_linear(model, protected_layers(model))
    assert all(isinstance(m, ProtectedLinear) for m in model.modules() if isinstance(m, nn.Linear))
    assert model[1]["a"] is model.again
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == list(before)
    model[0].protect(Removal.of(torch.eye(8)[:, :3]))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin[0].removal.factors, model[0].removal.factors)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8)}))
    plain.load_state_dict(model.state_dict(), strict=False)
    single = replace_linear(nn.Linear(4, 2), {"": (alone := nn.Linear(4, 2))})
    assert type(single) is nn.Linear and single is not alone
    assert isinstance(replace_linear(alone, {"": alone}), ProtectedLinear)


def test_training_with_either_way_is_the_same(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from torch.optim import SGD

    from subspace_lab.methods.continual.projection import GPM

    found = []
    for worth in (0, 1 << 60):
        monkeypatch.setitem(layers_module._WORTH, "cpu", worth)
        torch.manual_seed(0)
        method = GPM()
        model = method.prepare(nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 35)))
        for path, layer in method.layers.items():
            d = layer.weight.shape[1]
            generator = torch.Generator().manual_seed(d)
            method.memory.extend(path, torch.linalg.qr(torch.randn(d, d // 2 + 3, generator=generator))[0])
        method.install(model, 1)
        optimizer = method.build_optimizer(model, partial(SGD, lr=0.1, momentum=0.9))
        generator = torch.Generator().manual_seed(4)
        for _ in range(12):
            x, y = torch.randn(6, 30, generator=generator), torch.randint(35, (6,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
