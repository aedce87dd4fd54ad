from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.optim.compound import muon_with_adamw
from subspace_lab.optim.stack import CHUNK_ENTRIES
from subspace_lab.subspaces import SVD, Identity, Random, Randomized

ADAMW = partial(AdamW, lr=1e-2, weight_decay=0.1, fused=True)
MOMENTUM = partial(SGD, lr=1e-2, momentum=0.9, weight_decay=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    sizes = (12, 20, 20, 12, 5)  # tall, square and wide weights
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


X, Y = (
    torch.randn(64, 12, generator=torch.Generator().manual_seed(2)),
    torch.randn(64, 5, generator=torch.Generator().manual_seed(3)),
)


def groups(model: nn.Module, subspace: Any, **more: Any) -> list[dict[str, Any]]:
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim != 2]
    return [{"params": matrices, "subspace": subspace, **more}, {"params": rest}]


def train(model: nn.Module, optimizer: Optimizer, steps: int = 25) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(X) - Y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair(make_a: Callable[[nn.Module], Optimizer], make_b: Callable[[nn.Module], Optimizer], steps: int = 25) -> float:
    """Largest difference of weights between two optimizers after training from the same start."""
    a, b = net(), net()
    train(a, make_a(a), steps)
    train(b, make_b(b), steps)
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


# -- equality with the inner optimizer -------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [ADAMW, MOMENTUM, partial(Adam, lr=1e-2, weight_decay=0.1), partial(Adafactor, lr=1e-2)]
)
def test_identity_is_the_inner_optimizer(inner: Any) -> None:
    assert pair(lambda m: inner(m.parameters()), lambda m: SubspaceOptimizer(groups(m, Identity()), inner)) < 1e-6


def test_full_rank_equals_sgd_exactly_but_not_adamw() -> None:
    full = {"refresh_every": 0}
    assert (
        pair(
            lambda m: MOMENTUM(m.parameters()),
            lambda m: SubspaceOptimizer(groups(m, SVD(99)), MOMENTUM, **full),
        )
        < 1e-6
    )
    # Adam is not rotation invariant: a full-rank SVD basis gives another trajectory
    assert pair(lambda m: ADAMW(m.parameters()), lambda m: SubspaceOptimizer(groups(m, SVD(99)), ADAMW, **full)) > 1e-3


def test_full_rank_equals_adam_in_the_rotated_basis() -> None:
    torch.manual_seed(0)
    W0, grads = torch.randn(9, 6), [torch.randn(9, 6) for _ in range(6)]
    w = nn.Parameter(W0.clone())
    inner = partial(Adam, lr=1e-2)
    opt = SubspaceOptimizer([{"params": [("w", w)], "subspace": SVD(6)}], inner, refresh_every=0)
    for G in grads:
        w.grad = G.clone()
        opt.step()
    P = torch.linalg.svd(grads[0].double()).Vh.mT
    rotated = nn.Parameter(W0.double() @ P)
    oracle = Adam([rotated], lr=1e-2)
    for G in grads:
        rotated.grad = G.double() @ P
        oracle.step()
    torch.testing.assert_close(w.data.double(), rotated.data @ P.mT, atol=1e-6, rtol=1e-5)


# -- the constraint holds for the update -----------------------------------------------------------------


@pytest.mark.parametrize("inner", [ADAMW, MOMENTUM, partial(Adafactor, lr=1e-2), partial(muon_with_adamw, lr=1e-2)])
def test_the_update_stays_inside(inner: Any) -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, Random(3)), inner, refresh_every=0, decay="inside")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, opt, 5)
    for s in opt.units[0].stacks:
        for i, (name, p) in enumerate(zip(s.names, s.params, strict=True)):
            D = s.matrix(p.detach() - before[name], i)
            P = s.subspace.state["basis"][i]
            assert (D - D @ P @ P.mT).norm() <= 1e-5 * D.norm()
            assert D.norm() > 0


def test_rank_of_the_total_update_is_bounded() -> None:
    model, r, every, steps = net(), 2, 5, 15
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = SubspaceOptimizer(groups(model, SVD(r)), partial(AdamW, lr=1e-2, weight_decay=0.0), refresh_every=every)
    train(model, opt, steps)
    for n, p in model.named_parameters():
        if p.ndim == 2 and min(p.shape) > r * 3:
            s = torch.linalg.svdvals((p.detach() - before[n]).double())
            assert s[r * 3] < 1e-5 * s[0]


def test_decoupled_decay_acts_on_the_full_weight() -> None:
    w = nn.Parameter(torch.randn(8, 6))
    W0 = w.detach().clone()
    opt = SubspaceOptimizer([{"params": [("w", w)], "subspace": SVD(2)}], partial(AdamW, lr=0.1, weight_decay=0.5))
    w.grad = torch.zeros_like(w)
    opt.step()
    torch.testing.assert_close(w.data, W0 * (1 - 0.05))


# -- stacking, layouts, missing and bad gradients --------------------------------------------------------


def test_stacked_equals_one_at_a_time() -> None:
    def alone(m: nn.Module) -> Optimizer:
        first, rest = groups(m, SVD(3))
        singles = [{"params": [item], "subspace": SVD(3)} for item in first["params"]]
        return SubspaceOptimizer([*singles, rest], ADAMW, refresh_every=5)

    assert pair(alone, lambda m: SubspaceOptimizer(groups(m, SVD(3)), ADAMW, refresh_every=5)) < 1e-6


def test_transposed_weights_train_the_same() -> None:
    torch.manual_seed(0)
    W = torch.randn(14, 8)
    tall, wide = nn.Parameter(W.clone()), nn.Parameter(W.mT.contiguous())
    opt = SubspaceOptimizer([{"params": [("a", tall), ("b", wide)], "subspace": SVD(3)}], ADAMW, refresh_every=4)
    assert len(opt.units[0].stacks) == 1  # transposed shapes joined
    for _ in range(10):
        tall.grad = torch.randn(14, 8)
        wide.grad = tall.grad.mT.contiguous()
        opt.step()
    torch.testing.assert_close(tall.data, wide.data.mT, atol=1e-6, rtol=1e-5)


def test_convolutions_are_matrices() -> None:
    conv = nn.Conv2d(3, 8, 3)
    opt = SubspaceOptimizer([{"params": [("w", conv.weight)], "subspace": SVD(2)}], ADAMW)
    before = conv.weight.detach().clone()
    conv(torch.randn(2, 3, 6, 6)).square().mean().backward()
    opt.step()
    assert opt.units[0].stacks[0].shape == (1, 27, 8)
    assert (conv.weight - before).abs().max() > 0


def test_bf16_weights_have_fp32_bases_and_moments() -> None:
    full, half = net(), net().bfloat16()
    half.load_state_dict(full.state_dict())
    inner = partial(AdamW, lr=1e-2, weight_decay=0.0)
    start = full[1][0].weight.detach().clone()
    one, other = (SubspaceOptimizer(groups(m, SVD(3)), inner, refresh_every=5) for m in (full, half))
    for _ in range(12):
        for model, opt in ((full, one), (half, other)):
            opt.zero_grad()
            ((model(X.to(model[0][0].weight.dtype)).float() - Y) ** 2).mean().backward()
            opt.step()
    for s in other.units[0].stacks:
        P = s.subspace.state["basis"]
        assert P.dtype == torch.float32 and (P.mT @ P - torch.eye(P.shape[-1])).abs().max() <= 1e-5
        assert other.units[0].inner.state[s.coords[0]]["exp_avg"].dtype == torch.float32
    moved = full[1][0].weight - start
    gap = (half[1][0].weight.float() - full[1][0].weight).norm() / moved.norm()
    assert gap < 0.2  # rounding of weights and gradients, nothing else


def test_weight_without_gradient_is_skipped_and_counts_its_own_steps() -> None:
    torch.manual_seed(0)
    grads = torch.randn(6, 2, 10, 8)

    def run(skip: bool) -> tuple[Tensor, Tensor]:
        a, b = nn.Parameter(torch.ones(10, 8)), nn.Parameter(torch.ones(10, 8))
        opt = SubspaceOptimizer([{"params": [("a", a), ("b", b)], "subspace": SVD(3)}], ADAMW, refresh_every=3)
        for t in range(6):
            a.grad = grads[t, 0].clone()
            b.grad = None if skip and t in (1, 4) else grads[t, 1].clone()
            opt.step()
        return a.data, b.data

    def lone(which: list[int]) -> Tensor:
        b = nn.Parameter(torch.ones(10, 8))
        opt = SubspaceOptimizer([{"params": [("b", b)], "subspace": SVD(3)}], ADAMW, refresh_every=3)
        for t in which:
            b.grad = grads[t, 1].clone()
            opt.step()
        return b.data

    a, b = run(skip=True)
    torch.testing.assert_close(a, run(skip=False)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(b, lone([0, 2, 3, 5]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 3])
def test_bad_gradient_poisons_nothing(bad: float, when: int) -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(3)), ADAMW, refresh_every=3)
    for t in range(8):
        opt.zero_grad()
        ((model(X) - Y) ** 2).mean().backward()
        if t == when:
            first = next(p for p in model.parameters() if p.ndim == 2)
            assert first.grad is not None
            first.grad[0, 0] = bad
        opt.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for s in opt.units[0].stacks:
        P = s.subspace.state["basis"]
        assert (P.mT @ P - torch.eye(P.shape[-1])).abs().max() <= 1e-5


def test_zero_first_gradient_gets_its_basis_at_the_next_step() -> None:
    w = nn.Parameter(torch.randn(12, 8))
    opt = SubspaceOptimizer([{"params": [("w", w)], "subspace": SVD(2)}], ADAMW, refresh_every=100)
    w.grad = torch.zeros_like(w)
    opt.step()
    G = torch.randn(12, 8)
    w.grad = G.clone()
    opt.step()
    P = opt.units[0].stacks[0].subspace.state["basis"][0]
    V = torch.linalg.svd(G).Vh[:2].mT
    assert torch.linalg.matrix_norm(P @ P.mT - V @ V.mT) < 1e-4


# -- refreshes and moments -------------------------------------------------------------------------------


def refresh_steps(**options: Any) -> dict[str, list[int]]:
    seen: dict[str, list[int]] = {}
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(2)), ADAMW, **options)
    for t in range(13):
        before = {n: s.subspace.state["basis"][i].clone() for s in opt.units[0].stacks for i, n in enumerate(s.names)}
        train(model, opt, 1)
        for s in opt.units[0].stacks:
            for i, n in enumerate(s.names):
                if not torch.equal(before[n], s.subspace.state["basis"][i]):
                    seen.setdefault(n, []).append(t)
    return seen


def test_refresh_happens_exactly_at_multiples_of_the_interval() -> None:
    assert set(map(tuple, refresh_steps(refresh_every=6).values())) == {(0, 6, 12)}
    assert set(map(tuple, refresh_steps(refresh_every=0).values())) == {(0,)}


def test_staggered_refreshes_spread_over_the_interval() -> None:
    seen = refresh_steps(refresh_every=8, stagger=True)
    later = sorted(steps[1] for steps in seen.values())
    assert len(set(later)) == len(later) == 4  # four matrices, no two at one step
    assert all(steps[0] == 0 and all(b - a <= 8 for a, b in pairwise(steps)) for steps in seen.values())


def _momentum(opt: SubspaceOptimizer) -> Tensor:
    s = opt.units[0].stacks[0]
    return s.subspace.lift(opt.units[0].inner.state[s.coords[0]]["exp_avg"])


def test_rotation_keeps_the_momentum_inside_the_common_subspace() -> None:
    torch.manual_seed(0)
    for moments, bound in (("rotate", 1e-6), ("keep", None)):
        w = nn.Parameter(torch.randn(20, 10))
        opt = SubspaceOptimizer(
            [{"params": [("w", w)], "subspace": SVD(9)}],
            partial(Adam, lr=1e-3, betas=(1.0 - 1e-9, 0.999)),
            refresh_every=3,
            moments=moments,
        )
        for t in range(4):
            w.grad = torch.randn(20, 10)
            before = _momentum(opt) if t == 3 else None
            opt.step()
        assert before is not None
        P = opt.units[0].stacks[0].subspace.state["basis"]
        drift = (_momentum(opt) - before @ P @ P.mT).abs().max()
        assert (drift < bound) if bound else (drift > 1e-3 * before.abs().max())


def test_rotation_with_an_unchanged_basis_does_nothing() -> None:
    torch.manual_seed(0)
    G = torch.randn(12, 8)

    def run(moments: Any) -> Tensor:
        w = nn.Parameter(torch.ones(12, 8))
        opt = SubspaceOptimizer([{"params": [("w", w)], "subspace": SVD(3)}], ADAMW, refresh_every=2, moments=moments)
        for _ in range(6):
            w.grad = G.clone()
            opt.step()
        return w.data

    torch.testing.assert_close(run("rotate"), run("keep"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 1 << 16])
@pytest.mark.parametrize("stagger", [False, True])
def test_reset_starts_adam_again(chunk: int, stagger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fresh bias correction the first step in a new basis has Adam's full size lr, as at step 0."""
    monkeypatch.setitem(CHUNK_ENTRIES, "cpu", chunk)
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(10, 6)) for _ in range(3)]
    named = [(f"w{i}", w) for i, w in enumerate(weights)]
    inner = partial(Adam, lr=1.0)
    opt = SubspaceOptimizer(
        [{"params": named, "subspace": SVD(2)}], inner, refresh_every=4, moments="reset", stagger=stagger
    )
    for t in range(9):
        before = [w.detach().clone() for w in weights]
        bases = [opt.directions(n)["basis"].clone() for n, _ in named]
        for w in weights:
            w.grad = torch.randn(10, 6) * (1 + t)
        opt.step()
        for (n, w), old, basis in zip(named, before, bases, strict=True):
            if t and not torch.equal(basis, opt.directions(n)["basis"]):  # refreshed: every coordinate moved by lr
                Z = (w.detach() - old) @ opt.directions(n)["basis"]
                torch.testing.assert_close(Z.abs(), torch.ones_like(Z), atol=1e-3, rtol=0)


def test_moments_that_cannot_rotate_are_refused() -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(2)), partial(Adafactor, lr=1e-2), refresh_every=2, moments="rotate")
    with pytest.raises(ValueError, match="moments=rotate cannot rotate"):
        train(model, opt, 3)


# -- per-layer -------------------------------------------------------------------------------------------


def test_per_layer_equals_the_global_step_and_frees_gradients() -> None:
    a, b = net(), net()
    one = SubspaceOptimizer(groups(a, SVD(3)), ADAMW, refresh_every=5)
    each = SubspaceOptimizer(groups(b, SVD(3)), ADAMW, refresh_every=5, per_layer=True)
    assert train(a, one) == pytest.approx(train(b, each), abs=1e-5)
    ((b(X) - Y) ** 2).mean().backward()
    assert all(p.grad is None for p in b.parameters())


# -- state -----------------------------------------------------------------------------------------------

INNERS = [ADAMW, MOMENTUM, partial(Adafactor, lr=1e-2), partial(muon_with_adamw, lr=1e-2)]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("subspace", [SVD(3), Randomized(3), Random(3)])
@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"per_layer": True}])
def test_resumed_run_continues_bit_for_bit(inner: Any, subspace: Any, options: dict[str, bool]) -> None:
    def make(m: nn.Module) -> SubspaceOptimizer:
        return SubspaceOptimizer(groups(m, subspace), inner, refresh_every=5, **options)

    model = net()
    whole = train(model, make(model), 18)
    part = net()
    opt = make(part)
    train(part, opt, 11)  # in the middle of an interval
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net()
    other.load_state_dict(saved["model"])
    again = make(other)
    again.load_state_dict(saved["optimizer"])
    assert train(other, again, 7) == whole[11:]


def test_state_does_not_depend_on_parameter_order() -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(3)), ADAMW, refresh_every=5)
    train(model, opt, 7)
    copy = net()
    copy.load_state_dict(model.state_dict())
    reordered = [{**g, "params": list(reversed(g["params"]))} for g in groups(copy, SVD(3))]
    other = SubspaceOptimizer(reordered, ADAMW, refresh_every=5)
    other.load_state_dict(opt.state_dict())
    assert train(copy, other, 6) == train(model, opt, 6)


def test_state_for_other_parameters_is_refused() -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(3)), ADAMW)
    lone = SubspaceOptimizer([{"params": [("w", nn.Parameter(torch.ones(3, 3)))], "subspace": SVD(1)}], ADAMW)
    with pytest.raises(ValueError, match=r"other parameters: missing \['w'\]"):
        lone.load_state_dict(opt.state_dict())


def test_state_bytes_follow_from_the_shapes() -> None:
    w = nn.Parameter(torch.randn(20, 12))
    opt = SubspaceOptimizer([{"params": [("w", w)], "subspace": SVD(3)}], ADAMW)
    w.grad = torch.randn_like(w)
    opt.step()
    moments, counter, basis, ready = 2 * 20 * 3 * 4, 4, 12 * 3 * 4, 1
    assert opt.state_bytes() == moments + counter + basis + ready


def test_meta_tensors_give_the_same_bytes() -> None:
    def run(device: str) -> int:
        with torch.device(device):
            model = net()
        opt = SubspaceOptimizer(groups(model, SVD(3)), partial(AdamW, lr=1e-3, foreach=True), refresh_every=5)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
        return opt.state_bytes()

    assert run("meta") == run("cpu")


def test_schedulers_and_closures_work() -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(3)), ADAMW, refresh_every=5)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.0 if t else 1.0)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = ((model(X) - Y) ** 2).mean()
        loss.backward()
        return loss

    assert opt.step(closure) > 0
    schedule.step()
    after = [p.detach().clone() for p in model.parameters()]
    opt.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))


def test_captured_energy_is_measured_on_demand() -> None:
    model = net()
    opt = SubspaceOptimizer(groups(model, SVD(3)), ADAMW, refresh_every=1)
    train(model, opt, 2)
    assert "captured_energy" not in opt.metrics()
    opt.measure = True
    train(model, opt, 1)
    kept = total = 0.0
    for s in opt.units[0].stacks:
        for g in s.grads():
            values = torch.linalg.svdvals(g) ** 2
            kept, total = kept + values[:3].sum().item(), total + values.sum().item()
    assert abs(float(opt.metrics()["captured_energy"]) - kept / total) < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("subspace", [SVD(8), Randomized(8), Random(8)])
def test_no_host_synchronisation_between_refreshes(subspace: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 64)).cuda()
    opt = SubspaceOptimizer(groups(model, subspace), partial(AdamW, lr=1e-3, fused=True), refresh_every=100)
    x = torch.randn(32, 64, device="cuda")
    for t in range(6):
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if t >= 3 else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
