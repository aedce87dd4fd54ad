"""HLOP: the contract, Hebbian learning example by example, what the rows converge to, resuming mid-task, options."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from contracts.continual import OPTIMIZERS, ContinualContract, examples, learn, small_model, task
from reference.hlop_literal import HlopRows, rows_for, weight_gradient
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.hlop import HLOP, oja


class TestHLOP(ContinualContract):
    """`threshold` stands for the number of rows; what is learnt online does not hold old outputs exactly."""

    keeps_outputs = False

    def build(self, threshold: float = 0.9) -> ContinualMethod:
        rows = {0.0: [0], 1.0: [20]}.get(threshold, [4])
        return HLOP(rows, more=rows, fewer=[0])


def _inputs(n: int = 400, d: int = 12, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d, rank, generator=g))[0]
    return torch.randn(n, rank, generator=g) @ U.T, U


def test_rows_converge_to_the_inputs_subspace_and_leave_old_ones_alone() -> None:
    X, U = _inputs()
    old = torch.linalg.qr(torch.randn(12, 2))[0]
    old = torch.linalg.qr(old - U @ (U.T @ old))[0]
    torch.manual_seed(1)
    H, v = nn.init.orthogonal_(torch.empty(3, 12)), torch.zeros(3, 12)
    mixed = X + torch.randn(400, 2) @ old.T  # the old rows take their share
    for part in list(mixed.split(20)) * 20:
        H, v = oja(H, v, part, old, 0.02)
    residual = (X - X @ H.T @ H).square().sum() / X.square().sum()
    assert residual < 1e-3
    torch.testing.assert_close(H @ H.T, torch.eye(3), atol=2e-2, rtol=0)
    assert (H @ old).abs().max() < 2e-2


def test_one_batch_is_five_steps_of_the_subspace_rule() -> None:
    X, _ = _inputs(n=7, rank=5)
    torch.manual_seed(2)
    old = torch.linalg.qr(torch.randn(12, 2))[0]
    H, v = torch.randn(4, 12), torch.zeros(4, 12)
    literal = HlopRows(torch.cat([old.T, H]), fixed=2, lr=0.05)
    for scale in (1.0, 30.0, 0.5):  # 30: some entries are clamped
        H, v = oja(H, v, scale * X, old, 0.05)
        literal.learn(scale * X)
        if scale == 30.0:  # the rule itself diverges from here; go on from the same rows
            torch.testing.assert_close(v, literal.velocity[2:].float(), rtol=1e-3, atol=1e-3)
            H, v = literal.H[2:].float() * 1e-2, v * 0
            literal.H[2:], literal.velocity[2:] = H.double(), 0
    torch.testing.assert_close(H, literal.H[2:].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(literal.H[:2].float(), old.T)


def test_two_tasks_equal_the_papers_equations() -> None:
    method = HLOP([4, 3], more=[2], fewer=[0], hebbian_lr=0.02, hebbian_lr_first=0.01)
    model = method.prepare(small_model())
    W = [p.detach().double().clone() for p in model.parameters()]
    old: list[Tensor | None] = [None] * 3
    for index in range(2):
        now = task(index)
        method.begin_task(model, now)
        counts = [len(H) for H in method.rows.values()]
        assert counts == ([4, 3, 3] if not index else [2, 2, 2])
        rows = []
        for i, H in enumerate(method.rows.values()):
            fixed = old[i]
            both = H if fixed is None else torch.cat([fixed, H])
            rows.append(HlopRows(both, 0 if fixed is None else len(fixed), 0.02 if i else 0.01))
        learn(method, model, now, partial(torch.optim.SGD, lr=0.05), steps=12)
        for batch in list(now.batches(batch_size=10)) * 2:
            leaves = [w.clone().requires_grad_() for w in W]
            x, inputs, outputs = batch["inputs"].double(), [], []
            for i, w in enumerate(leaves):
                inputs.append(x.detach())
                x = x @ w.T
                outputs.append(x)
                x = x.tanh() if i < 2 else x
            deltas = torch.autograd.grad(cross_entropy(x, batch["labels"]), outputs)
            for i, (delta, X) in enumerate(zip(deltas, inputs, strict=True)):
                fixed = old[i]
                H_old = torch.zeros(0, X.shape[1]) if fixed is None else fixed
                W[i] = W[i] - 0.05 * weight_gradient(delta, X, H_old.double())
                rows[i].learn(X)
        for H, r in zip(method.rows.values(), rows, strict=True):
            torch.testing.assert_close(H, r.H[r.fixed :].float(), atol=1e-5, rtol=1e-4)
        for p, w in zip(model.parameters(), W, strict=True):
            torch.testing.assert_close(p.detach(), w.float(), atol=1e-5, rtol=1e-4)
        method.end_task(model, now)
        for i, (M, r) in enumerate(zip((M for _, M in method.memory.items()), rows, strict=True)):
            spanned = torch.linalg.qr(r.H.T)[0].float()  # merged rows: the old ones and the new, orthonormalised
            torch.testing.assert_close(M @ M.T, spanned @ spanned.T, atol=1e-4, rtol=0)
            previous = old[i]
            assert previous is None or torch.equal(M.T[: len(previous)], previous)
            old[i] = M.T.clone()


def test_rows_learn_in_training_only_and_hooks_go() -> None:
    method = HLOP([3], more=[3], fewer=[0])
    model = method.prepare(small_model())
    method.begin_task(model, task(0))
    method.install(model, 0)
    method.install(model, 0)  # once more: one hook all the same
    before = {path: H.clone() for path, H in method.rows.items()}
    x, _ = examples(0)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert all(torch.equal(H, before[path]) for path, H in method.rows.items())
    model(x)
    once, _ = oja(before["0"], torch.zeros_like(before["0"]), x, None, 0.001)
    torch.testing.assert_close(method.rows["0"], once)
    method.end_task(model, task(0))
    assert not any(m._forward_pre_hooks for m in model.modules()) and not method.rows
    assert method.basis_bytes() == method.memory.bytes()


def test_resumes_mid_task() -> None:
    def start() -> tuple[HLOP, nn.Module]:
        method = HLOP([4], more=[2], fewer=[0], hebbian_lr=0.05)
        return method, method.prepare(small_model())

    def go(method: HLOP, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        x, y = examples(1)
        for step in range(first, last):
            batch = {"inputs": x[step : step + 10], "labels": y[step : step + 10]}
            optimizer.zero_grad()
            method.objective(model, batch, task(1).loss).backward()
            optimizer.step()

    method, model = start()
    learn(method, model, task(0), OPTIMIZERS["momentum"])
    method.end_task(model, task(0))
    method.begin_task(model, task(1))
    method.install(model, 1)
    optimizer = method.build_optimizer(model, OPTIMIZERS["momentum"])
    go(method, model, optimizer, 0, 7)
    again, twin = start()
    again.load_state_dict(method.state_dict())
    again.install(twin, 1)
    twin.load_state_dict(model.state_dict())
    other = again.build_optimizer(twin, OPTIMIZERS["momentum"])
    other.load_state_dict(optimizer.state_dict())
    for m, net, o in ((method, model, optimizer), (again, twin, other)):
        go(m, net, o, 7, 20)
        m.end_task(net, task(1))
    for (path, M), N in zip(method.memory.items(), (N for _, N in again.memory.items()), strict=True):
        assert torch.equal(M, N), path
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_convolutions_learn_rows_of_patches() -> None:
    torch.manual_seed(0)
    method = HLOP([5], hebbian_lr_first=0.05)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5))
    model = method.prepare(net)
    method.begin_task(model, task(0))
    method.install(model, 0)
    x = torch.randn(40, 1, 5, 5).expand(-1, 2, -1, -1) * torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    for _ in range(50):
        model(x)
    patches = nn.functional.unfold(x, 3, padding=1).mT.reshape(-1, 18)
    H = method.rows["0"]
    captured = (patches @ torch.linalg.qr(H.T)[0]).square().sum() / patches.square().sum()
    best = torch.linalg.svdvals(patches).square()
    assert captured > 0.95 * best[:5].sum() / best.sum()


def test_row_counts_are_the_releases_for_its_sizes() -> None:
    numbers = HLOP([80, 200, 100], more=[70], fewer=[20])
    shares = HLOP([0.102, 0.25, 0.125], more=[0.0893, 0.0875], fewer=[0.0255, 0.025])
    for layer, (d, first) in enumerate([(784, 80), (800, 200), (800, 100)]):
        for index in range(10):
            expected = rows_for(index, first, 70, 20, 3)
            assert numbers.new_rows(index, layer, d) == shares.new_rows(index, layer, d) == expected


@pytest.mark.parametrize(
    "given", [{"rows": []}, {"rows": [1.5]}, {"more": [-1]}, {"fewer_every": 0}, {"hebbian_lr": 0.0}]
)
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        HLOP(**given)
