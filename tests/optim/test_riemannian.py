"""Riemannian SGD: on the manifold, equal to the literal optimizers, and an optimizer like any other."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from reference.gcr_literal import PaperClass, ReleaseClass
from torch import Tensor, nn

from subspace_lab.manifolds import Grassmann, Retraction, Sphere
from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.optim.riemannian import Momentum, RiemannianSGD, points
from subspace_lab.subspaces import Tangent

RETRACTIONS: list[Retraction] = ["polar", "qr", "geodesic"]
MOMENTA: list[Momentum] = ["transported", "ambient"]


def bases(C: int, k: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(C, n, k, dtype=torch.float64, generator=generator))
    return nn.Parameter(Q.mT.contiguous().to(dtype))


def optimizer_of(S: nn.Parameter, **options: Any) -> RiemannianSGD:
    return RiemannianSGD([{"params": [("S", S)], "manifold": "grassmann", "blocks": True}], **options)


def error(S: Tensor) -> float:
    return Grassmann().check(S.detach().mT).max().item()


@pytest.mark.parametrize("arc", [1e-3, 0.03, 0.5])
@pytest.mark.parametrize("update", RETRACTIONS)
def test_orthonormal_after_each_of_a_thousand_steps(update: Retraction, arc: float) -> None:
    S = bases(8, 8, 256)
    optimizer = optimizer_of(S, lr=1.0, momentum=0.0, update=update)
    generator = torch.Generator().manual_seed(1)
    worst, flips = 0.0, 0
    for _ in range(1000):
        D = torch.randn(S.shape, generator=generator)
        G = D - (D @ S.detach().mT) @ S.detach()
        S.grad = D * (arc / torch.linalg.matrix_norm(G, 2))[:, None, None]
        before = S.detach().clone()
        optimizer.step()
        worst = max(worst, error(S))
        flips += int(((before * S.detach()).sum(-1) < 0).sum())
    assert worst <= 2e-6
    assert flips == 0


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("update", RETRACTIONS)
def test_momentum_and_steps_do_not_wear_the_basis(update: Retraction, momentum: Momentum) -> None:
    S = bases(4, 6, 100)
    optimizer = optimizer_of(S, lr=0.05, update=update, transport=momentum)
    for i in range(200):
        S.grad = torch.randn(S.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
        assert error(S) <= 2e-6
    m = optimizer.state[S]["momentum_buffer"]
    vertical = (S.detach() @ m.mT).abs().max() / torch.linalg.matrix_norm(m, 2).max()
    assert (vertical < 1e-6) == (momentum == "transported")


def test_equals_the_paper_class_by_class() -> None:
    S = bases(3, 4, 30, torch.float64)
    literal = [PaperClass(b.detach().T, lr=0.1, momentum=0.9) for b in S]
    optimizer = optimizer_of(S, lr=0.1)
    for i in range(25):
        S.grad = torch.randn(S.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        optimizer.step()
        for own, c in zip(S.grad, literal, strict=True):
            c.step(own.T)
    for i, c in enumerate(literal):
        torch.testing.assert_close(S[i].detach().T, c.S, rtol=0, atol=1e-11)
        torch.testing.assert_close(optimizer.state[S]["momentum_buffer"][i].T, c.m, rtol=0, atol=1e-10)


def test_equals_the_release_class_by_class() -> None:
    S = bases(3, 4, 30, torch.float64)
    literal = [ReleaseClass(b.detach().T, lr=0.02, momentum=0.9, reorth_step=5) for b in S]
    optimizer = optimizer_of(S, lr=0.02, transport="ambient", reorthonormalize_every=5)
    signs = 0
    for i in range(25):
        S.grad = torch.randn(S.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        before = S.detach().clone()
        optimizer.step()
        signs += int(((before * S.detach()).sum(-1) < 0).sum())
        for own, c in zip(S.grad, literal, strict=True):
            c.step(own.T)
    for i, c in enumerate(literal):
        torch.testing.assert_close(S[i].detach().T, c.S, rtol=0, atol=1e-11)
    assert signs > 0  # LAPACK's, which the release does not mend


def test_paper_and_release_differ() -> None:
    ends = []
    for options in ({}, {"transport": "ambient"}, {"update": "polar"}):
        S = bases(2, 3, 20, torch.float64)
        optimizer = optimizer_of(S, lr=0.1, **options)
        for i in range(5):
            S.grad = torch.randn(S.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            optimizer.step()
        ends.append(S.detach().mT @ S.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-3 and (ends[0] - ends[2]).abs().max() > 1e-3


def test_without_momentum_both_spaces_are_one() -> None:
    ends = []
    for momentum in MOMENTA:
        S = bases(2, 3, 20)
        optimizer = optimizer_of(S, lr=0.1, momentum=0.0, transport=momentum)
        S.grad = torch.ones_like(S) + torch.arange(20.0)
        optimizer.step()
        assert "momentum_buffer" not in optimizer.state[S]
        ends.append(S.detach().clone())
    assert torch.equal(*ends)


def test_equals_sgd_in_the_tangent_subspace() -> None:
    """`SubspaceOptimizer` with `Tangent` is the general form of the same descent; its momentum lives elsewhere."""
    S = bases(1, 3, 12, torch.float64)
    W = nn.Parameter(S.detach()[0].mT.float().clone())
    ours = optimizer_of(S, lr=0.05, momentum=0.0, update="polar")
    general = SubspaceOptimizer(
        [{"params": [("W", W)], "subspace": Tangent(Grassmann())}], partial(torch.optim.SGD, lr=0.05)
    )
    for i in range(10):
        D = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(i))
        S.grad, W.grad = D.double(), D[0].mT.clone()
        ours.step()
        general.step()
    torch.testing.assert_close(S.detach()[0].mT.float(), W.detach(), rtol=0, atol=2e-5)


def test_a_rank_deficient_gradient_is_no_nan() -> None:
    for update in RETRACTIONS:
        S = bases(2, 8, 64)
        optimizer = optimizer_of(S, lr=0.3, update=update)
        low = torch.randn(2, 8, 2) @ torch.randn(2, 2, 64)  # batch 2: rank 2 of 8
        for D in (low, torch.zeros_like(low), low):
            S.grad = D
            optimizer.step()
            assert torch.isfinite(S).all() and error(S) <= 2e-6


def test_a_bad_gradient_stops_its_own_point_only() -> None:
    for update in RETRACTIONS:
        S, T = bases(3, 4, 20), bases(3, 4, 20)
        bad, good = optimizer_of(S, lr=0.1, update=update), optimizer_of(T, lr=0.1, update=update)
        D = torch.randn(S.shape, generator=torch.Generator().manual_seed(0))
        T.grad = D.clone()
        T.grad[1] = 0
        S.grad = D.clone()
        S.grad[1, 0, 0] = torch.inf
        bad.step()
        good.step()
        assert torch.equal(S, T)


def test_a_step_of_length_zero_changes_no_bit() -> None:
    S = bases(3, 4, 20)
    before = S.detach().clone()
    optimizer = optimizer_of(S, lr=0.0)
    S.grad = torch.randn_like(S)
    optimizer.step()
    assert torch.equal(S, before) and optimizer.state[S]["momentum_buffer"].abs().max() > 0


def test_saved_and_loaded_it_goes_on_bit_for_bit() -> None:
    def gradient(i: int) -> Tensor:
        return torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(i))

    S = bases(3, 4, 20)
    optimizer = optimizer_of(S, lr=0.1, transport="ambient", reorthonormalize_every=3)
    for i in range(4):
        S.grad = gradient(i)
        optimizer.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), S.detach()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    T = nn.Parameter(weights.clone())
    other = optimizer_of(T, lr=0.7)  # its options come with the state
    other.load_state_dict(state)
    assert other.state[T]["step"] == 4 and other.param_groups[0]["manifold"] == "grassmann"
    for i in range(4, 9):
        S.grad = gradient(i)
        T.grad = gradient(i)
        optimizer.step()
        other.step()
        assert torch.equal(S, T)


def test_closures_run_once_with_gradients() -> None:
    S = bases(2, 3, 10)
    optimizer = optimizer_of(S, lr=0.1)
    target = torch.randn(10, generator=torch.Generator().manual_seed(0))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(S @ target).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert calls == losses
    assert losses[-1] == pytest.approx(-2 * float(target.square().sum()), rel=1e-3)  # both subspaces contain it


WEIGHTS = {
    "wide": (6, 20),
    "tall": (20, 6),
    "square": (8, 8),
    "convolution": (6, 3, 5, 5),
    "channels_last": (6, 3, 5, 5),
}


@pytest.mark.parametrize("manifold", ["grassmann", "stiefel", "sphere"])
@pytest.mark.parametrize("shape", WEIGHTS)
def test_ordinary_weights_live_on_manifolds(manifold: Any, shape: str) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(WEIGHTS[shape]))
    if shape == "channels_last":
        W.data = W.data.to(memory_format=torch.channels_last)
    rows = points(W.detach().clone(), manifold, blocks=False)
    unit = torch.linalg.qr(rows.mT)[0].mT
    W.data.copy_((unit[:, 0] if manifold == "sphere" else unit[0] if shape != "tall" else unit[0].mT).reshape(W.shape))
    optimizer = RiemannianSGD([{"params": [W], "manifold": manifold}], lr=0.003)
    start = W.detach().clone()
    target = torch.randn(W.shape)

    def loss() -> Tensor:
        return (points(W, manifold, blocks=False) @ points(target, manifold, blocks=False).mT).square().sum()

    first = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        (-loss()).backward()
        optimizer.step()
    now = points(W.detach(), manifold, blocks=False)
    assert (Sphere() if manifold == "sphere" else Grassmann()).check(now.mT).max() <= 2e-6
    assert (loss().item() > 1.2 * first and not torch.equal(W, start)) or shape == "square"
    assert W.is_contiguous(memory_format=torch.channels_last) == (shape == "channels_last")


def test_weights_of_one_shape_step_as_if_alone() -> None:
    together = [nn.Parameter(bases(1, 4, 20, seed=i).detach()[0].clone()) for i in range(3)]
    alone = copy.deepcopy(together)
    joint = RiemannianSGD([{"params": together, "manifold": "stiefel"}], lr=0.1)
    single = [RiemannianSGD([{"params": [p], "manifold": "stiefel"}], lr=0.1) for p in alone]
    for i in range(6):
        for j, (a, b) in enumerate(zip(together, alone, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * i + j))
            b.grad = a.grad.clone()
        if i == 2:
            together[1].grad = alone[1].grad = None  # skipped, and counts its own steps from now on
        joint.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert [joint.state[p]["step"] for p in together] == [6, 5, 6]


@pytest.mark.parametrize(
    ("message", "group", "options"),
    [
        ("unknown manifold 'grasmann'", {"manifold": "grasmann"}, {}),
        (r"blocks must be \(B, k, n\)", {"blocks": True}, {}),
        ("unknown retraction", {}, {"update": "cayley"}),
        ("transport must be", {}, {"transport": "parallel"}),
        ("momentum in", {}, {"momentum": 1.0}),
        ("reorthonormalize_every", {}, {"reorthonormalize_every": -1}),
    ],
)
def test_mistakes_are_told(message: str, group: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        RiemannianSGD([{"params": [nn.Parameter(torch.randn(4, 9))], **group}], **options)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="would round off it"):
        RiemannianSGD([nn.Parameter(torch.randn(4, 9, dtype=torch.bfloat16))])


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("update", RETRACTIONS)
def test_on_a_gpu_no_step_asks_for_a_value(update: Retraction, momentum: Momentum) -> None:
    """Tensors that only have shapes raise as soon as a value is read: what would wait for a GPU."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        S = nn.Parameter(torch.empty(10, 4, 64, device="cuda"))
        S.grad = torch.empty_like(S)
        optimizer = optimizer_of(S, lr=0.1, update=update, transport=momentum)
        for _ in range(2):
            optimizer.step()
        with pytest.raises(DataDependentOutputException):
            bool(S.sum() > 0)  # it would be noticed


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("update", RETRACTIONS)
def test_on_a_gpu_it_is_the_same_and_never_waits(update: Retraction, momentum: Momentum) -> None:
    S = bases(5, 4, 64)
    T = nn.Parameter(S.detach().cuda())
    here, there = (optimizer_of(p, lr=0.1, update=update, transport=momentum) for p in (S, T))
    for i in range(5):
        D = torch.randn(S.shape, generator=torch.Generator().manual_seed(i))
        S.grad, T.grad = D, D.cuda()
        here.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first step may load libraries
        try:
            there.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(T.detach().cpu(), S.detach(), rtol=0, atol=1e-5)
    assert Grassmann().check(T.detach().mT).max() <= 2e-6
