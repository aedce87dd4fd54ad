"""ROGO: the contract, the paper's equations, when it relaxes, resuming mid-task; convolutions with TRGP; options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contracts.continual import OPTIMIZERS, ContinualContract, examples, learn, small_model, task
from contracts.overlapping import overlapping, relu_model, whole
from reference.rogo_literal import effective_weight, gpm_space, relaxing_space
from reference.trgp_literal import TrgpMlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.projection import GPM
from subspace_lab.methods.continual.rogo import ROGO, relaxing_directions
from subspace_lab.methods.continual.trgp import TRGP


class TestROGO(ContinualContract):
    """The learning rate of the contract does not decay, so that the frozen space stays GPM's."""

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return ROGO(threshold)


class TestRelaxedROGO(ContinualContract):
    """Relaxing moves W only where it is folded in, after the task: the weights' own updates keep their promise."""

    keeps_outputs = False

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        return ROGO(threshold, gamma=0.1, relax_at=[0.3, 0.6])


@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9, 1.1])
def test_relaxing_space_equals_the_greedy_search(gamma: float) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        F = torch.linalg.qr(torch.randn(12, 7, dtype=torch.float64))[0]
        G = torch.diag(torch.tensor([5, 4, 3, 0.3, 0.2], dtype=torch.float64)) @ torch.randn(5, 12, dtype=torch.float64)
        S, rest = relaxing_space(F, G, 0.97, gamma)
        got, left = relaxing_directions(F, G, 0.97, gamma)
        assert got.shape == S.shape and left.shape == rest.shape
        torch.testing.assert_close(got @ got.T, S @ S.T)
        torch.testing.assert_close(left @ left.T, rest @ rest.T)
    none, _ = relaxing_directions(F, torch.zeros(5, 12), 0.97, 0.5)
    assert none.shape[1] == 0


def test_rogo_equals_the_papers_equations_over_three_tasks() -> None:
    energy, gamma, beta, lr, threshold = 0.99, 0.5, 0.5, 0.03, 0.9
    method = ROGO(threshold, None, beta=beta, gamma=gamma, energy=energy, relax_at=[0.5])
    model = method.prepare(relu_model())
    W = [p.detach().clone() for p in model.parameters()]
    memories: list[Tensor | None] = [None] * 3
    moved = 0
    for index in range(3):
        now = overlapping(index)
        learn(method, model, now, partial(torch.optim.SGD, lr=lr), steps=12)
        S = [w.new_zeros(w.shape[1], 0) for w in W]
        Q = [w.new_zeros(0, 0) for w in W]
        frozen = [m if m is not None else w.new_zeros(w.shape[1], 0) for m, w in zip(memories, W, strict=True)]
        for step, batch in enumerate(list(now.batches(batch_size=10)) * 2, start=1):
            leaves = [w.clone().requires_grad_() for w in (*W, *Q)]
            real = [effective_weight(w, s, q) for w, s, q in zip(leaves[:3], S, leaves[3:], strict=True)]
            penalty = sum(((q - torch.eye(len(q))) ** 2).sum() for q in leaves[3:])
            loss = cross_entropy(TrgpMlp.run(real, batch["inputs"])[0], batch["labels"]) + beta * penalty
            grads = torch.autograd.grad(loss, leaves)
            for i, (w, g, m) in enumerate(zip(W, grads[:3], memories, strict=True)):
                W[i] = w - lr * (g if m is None else g - g @ m @ m.T)
            Q = [q - lr * g for q, g in zip(Q, grads[3:], strict=True)]
            if step == 6 and index:
                for i, g in enumerate(grads[:3]):
                    new, frozen[i] = relaxing_space(frozen[i], g, energy, gamma)
                    S[i] = torch.cat([S[i], new], dim=1)
                    Q[i] = torch.block_diag(Q[i], torch.eye(new.shape[1]))
                    moved += new.shape[1]
        W = [effective_weight(w, s, q) for w, s, q in zip(W, S, Q, strict=True)]
        for layer, w in zip(method.scaled().values(), W, strict=True):
            torch.testing.assert_close(layer.effective_weight(), w, atol=3e-6, rtol=0)
        x, _ = whole(now)
        before = model(x).detach()
        method.end_task(model, now)
        torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)  # the fold-in preserves outputs
        _, inputs = TrgpMlp.run(W, x)
        memories = [gpm_space(X, m, threshold) for X, m in zip(inputs, memories, strict=True)]
        for M, N in zip((M for _, M in method.memory.items()), memories, strict=True):
            assert N is not None
            torch.testing.assert_close(M @ M.T, (N @ N.T).float(), atol=3e-6, rtol=0)
    assert moved > 0


def test_rogo_relaxes_inside_the_memory_and_decay_leaves_its_scalings_alone() -> None:
    method = ROGO(0.95, gamma=0.2, relax_at=[0.4, 0.7])
    model = method.prepare(small_model())
    for index in range(2):
        learn(method, model, task(index), OPTIMIZERS["adamw"])
        if not index:
            method.end_task(model, task(index))
    widths = {path: S.shape[1] for path, S in method.relaxed.items()}
    assert sum(widths.values()) > 0 and method._relaxations == 2
    for path, layer in method.scaled().items():
        S, M, n = method.relaxed[path], method.memory[path], widths[path]
        assert (S - M @ (M.T @ S)).norm() <= 1e-5 * max(1.0, float(S.norm()))
        torch.testing.assert_close(S.T @ S, torch.eye(n), atol=1e-5, rtol=0)
        Q = layer.scales[0].detach()
        assert (Q[:n, :n] - torch.eye(n)).norm() > 0 or not n
        idle = Q - torch.eye(len(Q))
        idle[:n, :n] = 0
        assert torch.equal(idle, torch.zeros_like(idle))  # AdamW decays weights, but not these


def test_rogo_with_a_large_gamma_is_gpm() -> None:
    rogo, gpm = ROGO(0.9, gamma=1.01, relax_at=[0.5]), GPM(0.9)
    models = [m.prepare(small_model()) for m in (rogo, gpm)]
    for index in range(3):
        for method, model in zip((rogo, gpm), models, strict=True):
            learn(method, model, task(index), OPTIMIZERS["sgd"])
            method.end_task(model, task(index))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rogo_relaxes_when_the_learning_rate_has_decayed_and_returns_to_it() -> None:
    method = ROGO(0.95, gamma=0.2, decayed=0.5)
    model = method.prepare(small_model())
    learn(method, model, task(0), OPTIMIZERS["sgd"])
    method.end_task(model, task(0))
    method.begin_task(model, task(1))
    method.install(model, 1)
    optimizer = method.build_optimizer(model, OPTIMIZERS["sgd"])
    counts, rates = [], []
    for step in range(12):
        x, y = examples(1 if step < 4 else 2)  # other inputs ask for other directions
        optimizer.zero_grad()
        method.objective(model, {"inputs": x, "labels": y}, task(1).loss).backward()
        optimizer.step()
        if step % 4 == 3:
            for group in optimizer.param_groups:
                group["lr"] *= 0.4
        method.after_step(optimizer)
        counts.append(method._relaxations)
        rates.append(optimizer.param_groups[0]["lr"])
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert rates[3] == pytest.approx(0.05) and rates[-1] == pytest.approx(0.02)  # nothing is relaxed a third time


@pytest.mark.parametrize("stop", [3, 9, 16])
def test_rogo_resumes_mid_task(stop: int) -> None:
    """Before a relaxation, while its gradients are gathered, and after both."""

    def start() -> tuple[ROGO, nn.Module]:
        method = ROGO(0.95, gamma=0.2, gradient_steps=3, relax_at=[0.4, 0.7])
        return method, method.prepare(small_model())

    def go(method: ROGO, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = examples(1)
            batch = {"inputs": x[step : step + 10], "labels": y[step : step + 10]}
            optimizer.zero_grad()
            method.objective(model, batch, task(1).loss).backward()
            optimizer.step()
            method.after_step(optimizer)

    method, model = start()
    learn(method, model, task(0), OPTIMIZERS["momentum"])
    method.end_task(model, task(0))
    method.begin_task(model, task(1))
    method.install(model, 1)
    optimizer = method.build_optimizer(model, OPTIMIZERS["momentum"])
    go(method, model, optimizer, 0, stop)
    again, twin = start()
    again.load_state_dict(method.state_dict())
    again.install(twin, 1)
    twin.load_state_dict(model.state_dict())
    other = again.build_optimizer(twin, OPTIMIZERS["momentum"])
    other.load_state_dict(optimizer.state_dict())
    go(method, model, optimizer, stop, 20)
    go(again, twin, other, stop, 20)
    assert sum(S.shape[1] for S in method.relaxed.values()) > 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_convolutions_are_scaled_and_protected() -> None:
    x, y = torch.randn(30, 2, 6, 6), torch.randint(0, 5, (30,))

    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "") -> Iterator[Any]:
        yield {"inputs": x, "labels": y}

    for method in (TRGP(0.8, trust=0.0), ROGO(0.8, gamma=0.1, gamma_conv=0.1, relax_at=[0.3])):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
        model = method.prepare(net)
        for index in range(2):
            now = replace(task(index), batches=batches)
            before = net[0].weight.detach().clone()
            learn(method, model, now, OPTIMIZERS["adamw"], steps=10)
            if index:
                M = method.memory["0"]
                D = (net[0].weight.detach() - before).flatten(1)
                assert D.norm() > 0 and (D @ M).norm() <= 1e-5 * D.norm()
                assert (net[0].effective_weight() - net[0].weight).norm() > 0  # type: ignore[operator]
            method.end_task(model, now)


@pytest.mark.parametrize(
    "given",
    [
        {"beta": -1.0},
        {"gamma": 0.0},
        {"energy": 0.0},
        {"gradient_steps": 0},
        {"relax_at": [0.2, 0.4, 0.6]},
        {"relax_at": [1.5]},
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        ROGO(**given)
