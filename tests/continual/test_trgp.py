"""Scaled layers and TRGP: the contract, the paper's equations, what old tasks answer, options."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contracts.continual import OPTIMIZERS, ContinualContract, learn
from contracts.overlapping import cast, overlapping, relu_model, whole
from reference.trgp_literal import TrgpMlp
from torch import Tensor, nn

from subspace_lab.continual.scaled_layers import ScaledLinear, make_scalable
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.trgp import TRGP


class TestTRGP(ContinualContract):
    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return TRGP(threshold, trust=0.1)


@pytest.mark.parametrize("rows", [3, 50])
def test_scaled_linear_is_its_effective_weight_both_ways(rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 7)
    names, x = set(layer.state_dict()), torch.randn(2, rows, 12)
    plain = layer(x).detach()
    make_scalable(layer)
    assert isinstance(layer, ScaledLinear) and set(layer.state_dict()) == names
    assert torch.equal(layer(x), plain)
    bases = [torch.linalg.qr(torch.randn(12, r))[0] for r in (4, 2)]
    layer.set_regions(bases)
    torch.testing.assert_close(layer(x), plain)
    with torch.no_grad():
        for Q in layer.scales:
            Q += 0.3 * torch.randn_like(Q)
    W = layer.weight.detach()
    expected = W + sum(W @ S @ (Q - torch.eye(len(Q))) @ S.T for S, Q in zip(bases, layer.scales, strict=True))
    torch.testing.assert_close(layer.effective_weight(), expected)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)
    kept = list(layer.scales)
    layer.set_regions([S.clone() for S in bases])  # installed once more
    assert all(a is b for a, b in zip(layer.scales, kept, strict=True))
    with layer.scaled_as(bases[:1], [torch.zeros(4, 4)]):
        torch.testing.assert_close(layer.effective_weight(), W - W @ bases[0] @ bases[0].T)
    assert all(a is b for a, b in zip(layer.scales, kept, strict=True))
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)
    before = layer(x).detach()
    layer.fold()
    torch.testing.assert_close(layer(x), before)
    assert set(layer.state_dict()) == names and not len(layer.scales)


def test_scaled_convolution_is_its_effective_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="reflect")
    plain = nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="reflect")
    make_scalable(layer)
    assert isinstance(layer, nn.Conv2d)
    S = torch.linalg.qr(torch.randn(27, 6))[0]
    layer.set_regions([S])  # type: ignore[operator]
    with torch.no_grad():
        layer.scales[0] += torch.randn(6, 6)  # type: ignore[index]
        W = layer.weight.flatten(1)
        plain.weight.copy_((W + W @ S @ (layer.scales[0] - torch.eye(6)) @ S.T).view_as(layer.weight))  # type: ignore[index]
        plain.bias.copy_(layer.bias)  # type: ignore[union-attr, arg-type]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), plain(x))
    with pytest.raises(TypeError, match="ReLU"):
        make_scalable(nn.ReLU())


def test_trgp_equals_the_papers_equations_over_four_tasks() -> None:
    threshold, trust, lr = 0.95, 0.3, 0.05
    method = TRGP(threshold, samples=None, trust=trust)
    model = method.prepare(relu_model())
    literal = TrgpMlp([p.detach() for p in model.parameters()], threshold, trust)
    for index in range(4):
        now = overlapping(index)
        x, y = whole(now)
        literal.begin(x, y)
        learn(method, model, now, partial(torch.optim.SGD, lr=lr), steps=12)
        batches = list(now.batches(batch_size=10))
        for batch in batches * 2:
            literal.step(batch["inputs"], batch["labels"], lr)
        chosen = [[int(j) for j in method._trusted[index].get(path, [])] for path in method.layers]
        assert chosen == literal.chosen[index]
        for layer, (path, M) in enumerate(method.memory.items()):
            got = dict(model.named_modules())[path].effective_weight()  # type: ignore[operator]
            torch.testing.assert_close(got, literal.effective(index)[layer], atol=3e-6, rtol=0)
            N = literal.M[layer]
            torch.testing.assert_close(M @ M.T, (N @ N.T).float(), atol=3e-6, rtol=0)
        method.end_task(model, now)
        literal.end(x)
    assert any(c for chosen in literal.chosen for c in chosen)  # somebody was trusted
    for index in range(4):
        x, _ = whole(overlapping(index))
        with method.as_of(model, index):
            torch.testing.assert_close(model(x), literal.run(literal.effective(index), x)[0], atol=1e-5, rtol=0)


def test_trgp_old_tasks_keep_their_answers_and_scalings_resume() -> None:
    method = TRGP(1.0, samples=None, trust=0.05)
    model = method.prepare(relu_model(double=False))
    floats = [replace(t, batches=cast(t)) for t in (overlapping(i) for i in range(3))]
    answers: list[Tensor] = []
    for index, now in enumerate(floats):
        learn(method, model, now, OPTIMIZERS["adamw"], steps=20)
        if index == 1:
            assert any(len(layer.scales) for layer in method.scaled().values())
        method.end_task(model, now)
        x, _ = whole(now)
        with method.as_of(model, index):
            answers.append(model(x).detach())
    x, _ = whole(floats[1])
    with method.as_of(model, 1):  # of task 0 the strict rule leaves one direction open
        torch.testing.assert_close(model(x), answers[1], atol=1e-3, rtol=1e-3)
    assert (model(x) - answers[1]).abs().max() > 1e-2  # the scalings matter
    other = TRGP(1.0, samples=None, trust=0.05)
    twin = other.prepare(relu_model(double=False))
    other.load_state_dict(method.state_dict())
    other.install(twin, 2)
    twin.load_state_dict(model.state_dict())
    with method.as_of(model, 2), other.as_of(twin, 2):
        assert torch.equal(model(x), twin(x))
    assert other.basis_bytes() == method.basis_bytes() > method.memory.bytes()


@pytest.mark.parametrize(("given", "word"), [({"trust": 1.5}, "trust"), ({"trusted_tasks": -1}, "trusted_tasks")])
def test_values_out_of_range_are_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        TRGP(**given)
