"""Several optimizers as one: shared groups and state, so that nothing has to be kept in step."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from subspace_lab.optim.compound import Compound, muon_with_adamw


def parts() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return tuple(nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2))  # type: ignore[return-value]


def build(a: nn.Parameter, b: nn.Parameter) -> Compound:
    return Compound(
        [{"params": [("a", a)], "fast": True}, {"params": [("b", b)]}],
        lambda group: "fast" in group,
        {False: partial(AdamW, lr=0.01, weight_decay=0.1), True: partial(SGD, lr=0.5, momentum=0.9)},
    )


def gradients(a: nn.Parameter, b: nn.Parameter, i: int) -> None:
    for j, p in enumerate((a, b)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))


def run(optimizers: list[Optimizer], a: nn.Parameter, b: nn.Parameter, steps: range) -> None:
    for i in steps:
        gradients(a, b, i)
        for optimizer in optimizers:
            optimizer.step()


def test_it_is_its_children() -> None:
    a, b = parts()
    c, d = parts()
    joint = build(a, b)
    run([joint], a, b, range(5))
    run([SGD([c], lr=0.5, momentum=0.9), AdamW([d], lr=0.01, weight_decay=0.1)], c, d, range(5))
    assert torch.equal(a, c) and torch.equal(b, d)
    assert [group["lr"] for group in joint.param_groups] == [0.5, 0.01]  # in the order given
    assert set(joint.state) == {a, b} and "exp_avg" in joint.state[b] and "momentum_buffer" in joint.state[a]


def test_schedulers_reach_the_children() -> None:
    a, b = parts()
    joint = build(a, b)
    scheduler = LambdaLR(joint, lambda step: 1.0 if step == 0 else 0.0)
    run([joint], a, b, range(1))
    scheduler.step()
    before = a.detach().clone(), b.detach().clone()
    run([joint], a, b, range(1, 3))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_goes_on_bit_for_bit(way: str) -> None:
    a, b = parts()
    joint = build(a, b)
    run([joint], a, b, range(4))
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(joint.state_dict(), file)
        file.seek(0)
        c, d = (nn.Parameter(p.detach().clone()) for p in (a, b))
        other = build(c, d)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        (c, d), other = copy.deepcopy(((a, b), joint))
    other.param_groups[0]["lr"] = joint.param_groups[0]["lr"] = 0.25  # still the children's own dictionaries
    run([joint], a, b, range(4, 8))
    run([other], c, d, range(4, 8))
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, parts()[0])


def test_compounds_nest() -> None:
    """Muon with AdamW is a compound itself, and may be the body beside a manifold."""
    a, b = parts()
    e = nn.Parameter(torch.ones(4, 3))
    joint = Compound(
        [
            {"params": [a], "kind": "matrix"},
            {"params": [b], "kind": "other"},
            {"params": [e], "kind": "other", "plain": 1},
        ],
        lambda group: "plain" in group,
        {False: partial(muon_with_adamw, lr=0.02), True: partial(SGD, lr=1.0)},
    )
    state = copy.deepcopy(joint.state_dict())
    joint.load_state_dict(state)
    e.grad = torch.ones_like(e)
    run([joint], a, b, range(2))
    assert torch.equal(e, torch.full_like(e, -1.0))
    assert {name for s in joint.state.values() for name in s} >= {"momentum_buffer", "exp_avg"}
    for group in joint.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in (a, b, e)]
    run([joint], a, b, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(before, (a, b, e), strict=True))


def test_a_closure_runs_once() -> None:
    a, b = parts()
    joint = build(a, b)
    calls: list[int] = []

    def closure() -> Tensor:
        joint.zero_grad()
        loss = (a * b).sum()
        loss.backward()
        calls.append(1)
        return loss

    loss = joint.step(closure)
    assert calls == [1] and loss.requires_grad
