"""The reparametrised model against plain algebra: any module, tied and frozen weights, buffers, scales, precision."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from subspace_lab.errors import UserError
from subspace_lab.subspaces.flat import FlatModel
from subspace_lab.subspaces.layout import FlatLayout, layer_of


class Matrix:
    """A projection that is nothing but its matrix."""

    def __init__(self, P: Tensor) -> None:
        self.P, (self.D, self.d) = P, P.shape

    def lift(self, z: Tensor, *, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = self.P.to(z) @ z
        y = y if base is None else base + y
        return y if out is None else out.copy_(y)

    def project(self, g: Tensor) -> Tensor:
        return self.P.to(g).T @ g


class Net(nn.Module):
    """Tensors of very different sizes, a tied weight, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.big = nn.Linear(5, 60)
        self.norm = nn.BatchNorm1d(60)
        self.small = nn.Linear(60, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.big.bias[0] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.small(torch.tanh(self.norm(self.big(self.embed(x))))))


X = torch.arange(40) * 3 % 7
Y = torch.arange(40) * 5 % 7


def wrap(d: int = 6, *, scales: bool = False, dtype: torch.dtype = torch.float32) -> FlatModel:
    net = Net().to(dtype)
    layout = FlatLayout.of(net)
    P = torch.randn(layout.D, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return FlatModel(net, layout, Matrix(P / P.norm(dim=0)), scales=scales)  # type: ignore[arg-type]


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def test_counts_each_tied_weight_once_and_no_buffer() -> None:
    net = Net()
    layout = FlatLayout.of(net)
    assert sum(p.numel() for p in net.parameters()) == layout.D
    assert "head.weight" not in layout.names and "embed.weight" in layout.names
    assert not any("running" in name for name in layout.names)
    assert {"norm.weight", "norm.bias"} <= set(layout.names)


def test_starts_at_the_very_bits_of_the_model() -> None:
    plain, model = Net(), wrap()
    assert torch.equal(plain(X), Net()(X))
    assert torch.equal(model(X), Net()(X))
    for name, p in Net().named_parameters():
        assert p.detach().numpy().tobytes() == dict(model.inner.named_parameters())[name].detach().numpy().tobytes()
    model.to(torch.float64).to(torch.float32)
    model.sync()
    assert torch.signbit(model.inner.big.bias[0])  # −0 stays −0
    assert torch.signbit(model.theta_exact()[model.theta0() == 0]).any()


@pytest.mark.parametrize("scales", [False, True])
def test_gradient_is_the_adjoint_of_each_tensors_gradient(scales: bool) -> None:
    model = wrap(scales=scales, dtype=torch.float64)
    with torch.no_grad():
        model.z.copy_(torch.linspace(-1, 1, model.z.numel(), dtype=torch.float64))
        if model.lambdas is not None:
            model.lambdas.copy_(torch.linspace(0.5, 1.5, model.lambdas.numel(), dtype=torch.float64))
    loss_of(model).backward()
    for p in (model.z, model.lambdas):
        if p is None:
            continue
        assert p.grad is not None
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p[i] += sign * 1e-6
                    ends.append(loss_of(model).item())
                    p[i] -= sign * 1e-6
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(p.grad[i].item(), rel=1e-5, abs=1e-9)


def test_each_tensor_alone_gives_its_own_rows_of_the_adjoint() -> None:
    """A backward scaled per tensor (by 1/sqrt of its size, say) would pass a test of the sum's direction only."""
    model = wrap(dtype=torch.float64)
    plain = Net().double()
    loss_of(plain).backward()
    loss_of(model).backward()
    grads = dict(plain.named_parameters())
    P = model.projection.P  # type: ignore[attr-defined]
    parts = P.split(model.layout.sizes)
    for name, part in zip(model.layout.names, parts, strict=True):
        alone = wrap(dtype=torch.float64)
        with torch.no_grad():
            alone.projection.P = torch.zeros_like(P)  # type: ignore[attr-defined]
            start = sum(model.layout.sizes[: model.layout.names.index(name)])
            alone.projection.P[start : start + part.shape[0]] = part  # type: ignore[attr-defined]
        loss_of(alone).backward()
        expected = part.T @ grads[name].grad.reshape(-1)  # type: ignore[union-attr]
        assert torch.allclose(alone.z.grad, expected, rtol=1e-9, atol=1e-14)  # type: ignore[arg-type]


def test_every_coordinate_moves_the_output() -> None:
    model = wrap()
    model.eval()
    before = model(X)
    for i in range(model.z.numel()):
        with torch.no_grad():
            model.z.zero_()
            model.z[i] = 0.1
        assert not torch.equal(model(X), before)


def test_mode_device_and_state_reach_the_inner_module() -> None:
    model = wrap()
    model.eval()
    assert not model.inner.norm.training
    model.train()
    model(X)
    assert model.inner.norm.num_batches_tracked == 1
    state = model.state_dict()
    assert {"z", "inner.norm.running_mean"} <= set(state)
    assert not any("weight" in name for name in state)
    with torch.no_grad():
        model.z.fill_(0.3)
    other = wrap()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert torch.equal(other.theta(), model.theta())
    assert torch.equal(other.inner.norm.running_mean, model.inner.norm.running_mean)
    model.double()
    assert model.theta().dtype == model.inner.big.weight.dtype == torch.float64
    assert model.inner.big.weight.untyped_storage().data_ptr() == model.theta().untyped_storage().data_ptr()


def test_refuses_a_state_of_other_initial_weights() -> None:
    state = wrap().state_dict()
    net = Net()
    with torch.no_grad():
        net.big.weight[0, 0] += 1
    layout = FlatLayout.of(net)
    other = FlatModel(net, layout, wrap().projection)
    with pytest.raises(UserError, match="other initial weights"):
        other.load_state_dict(state)


def test_copies_are_whole() -> None:
    model = wrap()
    with torch.no_grad():
        model.z.fill_(0.2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.z.fill_(0.5)
    assert not torch.equal(twin.theta(), model.theta())
    assert torch.equal(twin.inner.big.weight.flatten(), twin.layout.split(twin.theta())[1].flatten())


def test_frozen_parameters_stay_and_targets_select() -> None:
    net = Net()
    net.small.requires_grad_(False)
    layout = FlatLayout.of(net)
    assert not any(name.startswith("small") for name in layout.names)
    only = FlatLayout.of(Net(), ["^big"])
    assert set(only.names) == {"big.weight", "big.bias"}
    before = net.small.weight.clone()
    model = FlatModel(net, layout, Matrix(torch.eye(layout.D)[:, :3]))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert torch.equal(model.inner.small.weight, before)
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim()) == 2 * 3


@pytest.mark.parametrize(("targets", "word"), [(["bigg"], "did you mean"), (["("], "regular expression")])
def test_wrong_targets_are_told(targets: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        FlatLayout.of(Net(), targets)


def test_full_orthogonal_subspace_is_direct_sgd() -> None:
    plain = Net().double()
    net = Net().double()
    layout = FlatLayout.of(net)
    Q, _ = torch.linalg.qr(torch.randn(layout.D, layout.D, dtype=torch.float64))
    model = FlatModel(net, layout, Matrix(Q))  # type: ignore[arg-type]
    a, b = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD([model.z], lr=0.1, momentum=0.9)
    for _ in range(10):
        for optimizer, m in ((a, plain), (b, model)):
            optimizer.zero_grad()
            loss_of(m).backward()
            optimizer.step()
    model.sync()
    direct = dict(plain.named_parameters())
    for name, p in model.inner.named_parameters():
        assert torch.allclose(p, direct[name], rtol=1e-10, atol=1e-12)


def test_scales_frozen_at_one_are_the_plain_subspace() -> None:
    did, said = wrap(), wrap(scales=True)
    assert said.lambdas is not None and said.lambdas.numel() == len(set(map(layer_of, said.layout.names)))
    optimizers = [torch.optim.Adam([m.z], lr=0.1) for m in (did, said)]
    for _ in range(4):
        for m, optimizer in zip((did, said), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(m).backward()
            optimizer.step()
    assert torch.allclose(did.theta(), said.theta(), rtol=0, atol=1e-6)


def test_accumulated_micro_batches_are_one_batch() -> None:
    one, two = wrap(), wrap()
    for model in (one, two):
        model.eval()
        with torch.no_grad():
            model.z.fill_(0.1)
    loss_of(one).backward()
    for half in (slice(0, 20), slice(20, 40)):
        (nn.functional.cross_entropy(two(X[half]), Y[half]) / 2).backward()
    assert torch.allclose(one.z.grad, two.z.grad, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_weights_follow_z_whatever_optimizer_writes_it(fused: bool, watched: bool) -> None:
    """torch's fused optimizers do not count up a parameter's version."""
    model = wrap()
    optimizer = torch.optim.AdamW([model.z], lr=0.1, fused=fused)
    if watched:
        model.watch(optimizer)
    loss_of(model).backward()
    optimizer.step()
    with torch.no_grad():
        model(X)
        expected = model.projection.lift(model.z, base=model.theta0())
    assert torch.equal(model._theta, expected) and not torch.equal(expected, model.theta0())


def test_a_stale_graph_is_an_error_and_not_a_wrong_gradient() -> None:
    model = wrap()
    stale = loss_of(model)
    with torch.no_grad():
        model.z.add_(1.0)
    loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        stale.backward()


def test_half_precision_weights_keep_the_subspace_in_float32() -> None:
    model = wrap().to(torch.bfloat16)
    assert model.z.dtype == model.theta().dtype == torch.float32
    assert model.inner.big.weight.dtype == torch.bfloat16
    loss_of(model).backward()
    assert model.z.grad is not None and model.z.grad.dtype == torch.float32
    with torch.no_grad():
        model.z.add_(0.1)
    model.sync()
    part = model.layout.split(model.theta())[model.layout.names.index("big.weight")]
    assert torch.equal(model.inner.big.weight, part.bfloat16())


def test_refuses_gradient_checkpointing() -> None:
    net = Net()
    net.gradient_checkpointing = True  # type: ignore[assignment]
    with pytest.raises(UserError, match="gradient checkpointing"):
        FlatModel(net, FlatLayout.of(net), wrap().projection)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("roberta.encoder.layer.3.output.dense.weight", "roberta.encoder.layer.3"),
        ("classifier.dense.bias", "classifier.dense"),
        ("0.weight", "0"),
        ("scale", ""),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer
