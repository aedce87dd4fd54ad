"""DGP: the contract, summed Jacobians against whole ones, what each treatment of the first layer holds, defences."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts.continual import OPTIMIZERS, ContinualContract, examples, learn, small_model, task
from reference.dgp_literal import column_sums, jacobians
from reference.rogo_literal import gpm_space
from torch import Tensor, nn
from torch.func import jacrev, vmap

from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.dgp import DGP, summed_jacobian_grams
from subspace_lab.methods.continual.projection import GPM


class TestDGP(ContinualContract):
    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return DGP(threshold, gradient_threshold=threshold, first_layer="projected", defense="none")


class TestDefendedDGP(ContinualContract):
    """The penalty's second derivatives reach the weights past the layers' own projection."""

    keeps_outputs = False

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        strength = 0.5 if threshold else 0.0
        return DGP(threshold, gradient_threshold=threshold, first_layer="projected", strength=strength)

    def test_without_protection_it_is_naive_bit_for_bit(self) -> None:
        """Not with a penalty: its second derivatives change the rounding."""


def _relu_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 24, bias=False), nn.ReLU(), nn.Linear(24, 5, bias=False)
    )


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().double() for p in model.parameters()]


def test_summed_jacobians_equal_whole_ones() -> None:
    model = _relu_model()
    x, y = examples(0)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = ({"inputs": x[i : i + 20], "labels": y} for i in (0, 20, 40))
    model.train()
    grams = summed_jacobian_grams(model, layers, batches, lambda net, b: net(b["inputs"]))
    assert all(m.training for m in model.modules())
    for gram, V in zip(grams.values(), column_sums(_weights(model), x), strict=True):
        torch.testing.assert_close(gram, V.T @ V, rtol=1e-4, atol=1e-4)
    J = jacobians(_weights(model), x[:1])[2][0]
    whole = jacrev(lambda z: model[:4](z))(x[0]).double()
    torch.testing.assert_close(J, whole, atol=1e-5, rtol=1e-4)


def test_summed_jacobians_reach_through_convolutions_and_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.conv(x)).flatten(2).mT.unsqueeze(1)
            h = nn.functional.scaled_dot_product_attention(h, h, h).squeeze(1)
            return self.out(h).mean(1)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 1, 6, 6)
    layers = {"conv": net.conv, "out": net.out}
    grams = summed_jacobian_grams(net, layers, iter([{"inputs": x}]), lambda m, b: m(b["inputs"]))
    step, seen = 1e-3, {}
    net.out.register_forward_pre_hook(lambda m, a: seen.update(h=a[0].detach()))
    net.double()
    net(x.double() + step)
    up = seen["h"]
    net(x.double() - step)
    V = ((up - seen["h"]) / (2 * step)).reshape(-1, 4)
    torch.testing.assert_close(grams["out"], V.T @ V, rtol=1e-3, atol=1e-4)
    P = nn.functional.unfold(torch.ones(3, 1, 6, 6), 3, padding=1, stride=2).mT.reshape(-1, 9).double()
    torch.testing.assert_close(grams["conv"], P.T @ P)


def test_bases_equal_the_papers_over_two_tasks() -> None:
    method = DGP(0.9, samples=None, gradient_threshold=0.8, first_layer="projected", defense="none")
    model = method.prepare(_relu_model())
    bases: list[Tensor | None] = [None] * 3
    for index in range(2):
        learn(method, model, task(index), OPTIMIZERS["sgd"])
        method.end_task(model, task(index))
        x = examples(index)[0].double()
        W, inputs = _weights(model), [x]
        for w in W[:2]:
            inputs.append((inputs[-1] @ w.T).relu())
        for i, (X, V) in enumerate(zip(inputs, column_sums(W, x), strict=True)):
            outputs = gpm_space(X, bases[i], 0.9)
            bases[i] = gpm_space(V, outputs, 0.8)
        for (path, M), N in zip(method.memory.items(), bases, strict=True):
            assert N is not None and M.shape == N.shape, (index, path)
            torch.testing.assert_close(M @ M.T, (N @ N.T).float(), atol=1e-4, rtol=0)


def _sensitivity(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacrev(lambda z: model(z)))(x).detach()


@pytest.mark.parametrize("first", ["own", "frozen"])
def test_old_outputs_and_sample_gradients_stay_where_gpm_loses_them(first: Any) -> None:
    """Inputs in few directions: an independent first layer and full energy hold the network's derivative as well.

    The compressed condition holds the derivative along the sum of the inputs' axes only.
    """
    torch.manual_seed(3)
    changes = {}
    for name in ("dgp", "gpm"):
        method: Any = (
            GPM(1.0, None)
            if name == "gpm"
            else DGP(1.0, None, gradient_threshold=1.0, first_layer=first, defense="none")
        )
        model = method.prepare(_relu_model())
        few = examples(0)[0][:6], examples(0)[1][:6]

        def batches(
            count: int | None = None, batch_size: int | None = None, purpose: str = "", few: Any = few
        ) -> Iterator[Any]:
            yield {"inputs": few[0], "labels": few[1]}

        old = replace(task(0), batches=batches)
        learn(method, model, old, OPTIMIZERS["sgd"])
        method.end_task(model, old)
        method.end_task(model, replace(old, index=1))
        outputs, along = model(few[0]).detach(), _sensitivity(model, few[0]).sum(-1)
        if name == "dgp":
            assert len(method._own) == (2 if first == "own" else 0)
        learn(method, model, replace(task(2), index=2), OPTIMIZERS["adamw"], steps=30)
        if first == "own" and name == "dgp":
            assert (model(few[0]) - outputs).norm() > 1e-2 * outputs.norm()
        with method.as_of(model, 1):
            torch.testing.assert_close(model(few[0]).detach(), outputs, atol=1e-3, rtol=1e-3)
            changes[name] = float((_sensitivity(model, few[0]).sum(-1) - along).norm() / along.norm())
    assert changes["dgp"] < 1e-3 < 3e-2 < changes["gpm"]


def test_own_first_layers_are_stored_swapped_and_resumed() -> None:
    method = DGP(0.9, first_layer="own")
    model = method.prepare(small_model(bias=True))
    firsts = []
    for index in range(2):
        learn(method, model, task(index), OPTIMIZERS["sgd"])
        method.end_task(model, task(index))
        firsts.append({n: p.detach().clone() for n, p in model[0].named_parameters()})
    assert "0" not in method.memory and (firsts[0]["bias"] - firsts[1]["bias"]).norm() > 0
    with method.as_of(model, 0):
        assert all(torch.equal(p, firsts[0][n]) for n, p in model[0].named_parameters())
    assert all(torch.equal(p, firsts[1][n]) for n, p in model[0].named_parameters())
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    again = DGP(0.9, first_layer="own")
    twin = again.prepare(small_model(bias=True))
    again.load_state_dict(torch.load(file, weights_only=True))
    again.install(twin, 1)
    twin.load_state_dict(model.state_dict())
    x, _ = examples(0)
    with method.as_of(model, 0), again.as_of(twin, 0):
        assert torch.equal(model(x), twin(x))
    assert again.basis_bytes() == method.basis_bytes() > method.memory.bytes()


def test_penalty_is_the_mean_squared_gradient_of_the_examples() -> None:
    model = small_model().double().train()
    x, y = examples(0)
    batch = {"inputs": x[:8].double(), "labels": y[:8]}
    method, plain = DGP(strength=0.7), DGP(strength=0.0)
    plus = method.objective(model, batch, task(0).loss) - plain.objective(model, batch, task(0).loss)
    squares = []
    for i in range(8):
        one = batch["inputs"][i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(task(0).loss(model, {"inputs": one, "labels": batch["labels"][i : i + 1]}), one)
        squares.append(g.square().sum())
    torch.testing.assert_close(plus.detach(), 0.7 * torch.stack(squares).mean())


@pytest.mark.parametrize("defense", ["gradient", "adversarial"])
def test_defences_smooth_the_network(defense: Any) -> None:
    sizes = []
    for chosen in (defense, "none"):
        method = DGP(defense=chosen, epsilon=0.3, strength=1.0)
        model = method.prepare(small_model())
        torch.manual_seed(0)
        learn(method, model, task(0), OPTIMIZERS["adam"], steps=150)
        x, y = examples(0)
        sizes.append(float(_sensitivity(model, x).norm()))
        assert (model(x).argmax(1) == y).float().mean() > 0.6
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.parametrize(
    "given",
    [
        {"first_layer": "shared"},
        {"defense": "gradients"},
        {"strength": -1.0},
        {"epsilon": 0.0},
        {"attack_steps": 0},
        {"gradient_threshold": 1.5},
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        DGP(**given)


def test_inputs_without_a_gradient_are_refused() -> None:
    method = DGP()
    model = method.prepare(small_model()).train()
    with pytest.raises(UserError, match="images"):
        method.objective(model, {"input_ids": torch.zeros(2, 3).long()}, task(0).loss)
