"""Grassmann class representation: the head's algebra, its training, and that everything else still works with it."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from reference.gcr_literal import logits
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from subspace_lab.errors import UserError
from subspace_lab.manifolds import Grassmann
from subspace_lab.methods.gcr import GCR, CosineSoftmax, Softmax
from subspace_lab.methods.manifold import ManifoldMethod, place
from subspace_lab.models.convolutional import build_small_cnn
from subspace_lab.models.heads import CosineHead, GrassmannHead, find_head


def head(n: int = 20, dims: tuple[int, ...] = (3, 1, 4, 3), gamma: float = 25.0) -> GrassmannHead:
    torch.manual_seed(0)
    return GrassmannHead(n, dims, gamma).double()


def net(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, classes))


def error(h: nn.Module) -> float:
    assert isinstance(h, GrassmannHead)
    return h.orthonormality().item()


# -- the head --------------------------------------------------------------------------------------------------------


def test_logits_and_their_gradients_equal_the_equation() -> None:
    h = head()
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    own = torch.autograd.grad(cross_entropy(h(x), y), [x, *h.bases.parameters()])
    bases = [h.basis(i) for i in range(4)]
    literal = logits(x, bases, 25.0)
    torch.testing.assert_close(h(x), literal, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(cross_entropy(literal, y), [x, *h.bases.parameters()])
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_only_the_subspace_counts() -> None:
    h, turned = head(dims=(3, 3)), head(dims=(3, 3))
    Q, _ = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64))
    with torch.no_grad():
        turned.bases["k3"].copy_((h.bases["k3"].mT @ Q).mT)
    x, y = torch.randn(6, 20, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    torch.testing.assert_close(h(x), turned(x), rtol=0, atol=1e-12)
    (D,) = torch.autograd.grad(cross_entropy(h(x), y), [h.bases["k3"]])
    (E,) = torch.autograd.grad(cross_entropy(turned(x), y), [turned.bases["k3"]])
    torch.testing.assert_close((D.mT @ Q).mT, E, rtol=0, atol=1e-12)
    inner = h.bases["k3"] @ D.mT  # SᵀD
    torch.testing.assert_close(inner, inner.mT, rtol=0, atol=1e-12)
    assert inner.abs().max() > 1e-3


def test_one_dimension_is_the_absolute_cosine_and_all_are_gamma() -> None:
    x = torch.randn(50, 20, dtype=torch.float64)
    h = head(dims=(1, 1, 1))
    cosine = nn.functional.normalize(x, dim=-1) @ h.bases["k1"][:, 0].T
    torch.testing.assert_close(h(x), 25 * cosine.abs(), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        head(n=6, dims=(6, 6))(x[:, :6]), torch.full((50, 2), 25.0, dtype=torch.float64), rtol=1e-6, atol=0
    )
    values = head(gamma=3.0)(x)
    assert values.min() >= 0 and values.max() <= 3


def test_drawn_uniformly() -> None:
    torch.manual_seed(0)
    n, k, C = 2048, 8, 300
    h = GrassmannHead(n, [k] * C)
    x = torch.randn(256, n)
    values = h(x)
    assert values.mean().item() == pytest.approx(25 * math.sqrt(k / n), rel=0.05)
    assert cross_entropy(values, torch.arange(256) % C).item() == pytest.approx(math.log(C), rel=0.03)
    again = GrassmannHead(n, [k] * C)
    assert torch.equal(again.bases["k8"], h.bases["k8"])  # from the run's seed alone, whatever was drawn meanwhile
    torch.manual_seed(1)
    assert not torch.equal(GrassmannHead(n, [k] * C).bases["k8"], h.bases["k8"])
    assert error(h) < 2e-6


def test_moving_a_feature_outwards_changes_nothing() -> None:
    h = head()
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(cross_entropy(h(x), torch.tensor([0, 1, 2, 3, 0, 1])), [x])
    assert (x * g).sum(-1).abs().max() < 1e-14 < g.abs().max()


def test_features_without_direction_have_finite_gradients() -> None:
    h = GrassmannHead(20, [3, 3])
    x = torch.zeros(2, 20)
    x[1] = torch.linalg.qr(torch.cat([h.bases["k3"].flatten(0, 1).T, torch.eye(20)], 1))[0][:, -1].detach()
    x.requires_grad_()
    found = torch.autograd.grad(cross_entropy(h(x), torch.tensor([0, 1])), [x, h.bases["k3"]])
    assert all(torch.isfinite(g).all() for g in found)


def test_bases_stay_in_float32() -> None:
    h = head().float()
    before = h.bases["k3"].detach().clone()
    x = torch.randn(4, 20)
    exact = h(x)
    for dtype in (torch.bfloat16, torch.float16):
        h.to(dtype)
        assert h.bases["k3"].dtype == torch.float32 and torch.equal(h.bases["k3"], before)
    assert h.half()(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(h(x), exact)


def test_cosine_head() -> None:
    torch.manual_seed(0)
    h = CosineHead(20, 7, 10.0)
    x = torch.randn(3, 20)
    cosine = nn.functional.cosine_similarity(x[:, None], h.weight[None], dim=-1)
    torch.testing.assert_close(h(x), 10 * cosine)
    torch.testing.assert_close(h(-3 * x), -h(x))


# -- finding and swapping --------------------------------------------------------------------------------------------


def test_heads_are_found_in_any_classifier() -> None:
    import timm
    from torchvision import models
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        found = {
            "resnet": find_head(models.resnet18())[0],
            "vgg": find_head(models.vgg13_bn())[0],
            "vit": find_head(models.vit_b_16())[0],
            "swin": find_head(timm.create_model("swin_tiny_patch4_window7_224"))[0],
            "deit": find_head(timm.create_model("deit3_small_patch16_224"))[0],
            "resnet50d": find_head(timm.create_model("resnet50d"))[0],
            "bert": find_head(BertForSequenceClassification(tiny))[0],
            "linear": find_head(nn.Linear(3, 2))[0],
        }
    assert found == {
        "resnet": "fc",
        "vgg": "classifier.6",
        "vit": "heads.head",
        "swin": "head.fc",
        "deit": "head",
        "resnet50d": "fc",
        "bert": "classifier",
        "linear": "",
    }


@pytest.mark.parametrize("method", [GCR(k=2), CosineSoftmax(), Softmax()])
def test_the_rest_of_the_model_stays(method: Any) -> None:
    plain, model = net(), method.prepare(net())
    assert torch.equal(model[0].weight, plain[0].weight)
    assert model(torch.randn(3, 12)).shape == (3, 5)
    assert find_head(model)[0] == "2"
    assert isinstance(model[2], nn.Linear) == (method.name == "softmax")
    alone = method.prepare(nn.Linear(4, 3))
    assert alone(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("k=17: expected between 1 and the n=16", lambda: GCR(k=17).prepare(net())),
        ("k=0: expected between 1", lambda: GCR(k=[1, 2, 0, 1, 1]).prepare(net())),
        ("lists 2 dimensions and the model has 5", lambda: GCR(k=[1, 2]).prepare(net())),
        ("gamma=-1", lambda: GCR(gamma=-1).prepare(net())),
        ("gamma=nan", lambda: CosineSoftmax(gamma=math.nan).prepare(net())),
        ("method.head=1: not a linear layer", lambda: GCR(head="1").prepare(net())),
        ("method.head=fc: no such layer.*last linear layers are 0, 2", lambda: GCR(head="fc").prepare(net())),
        ("head_lr=-1", lambda: GCR(head_lr=-1)),
        ("is a GrassmannHead already", lambda: GCR().prepare(GCR(k=2).prepare(net()))),
        ("no linear layer", lambda: Softmax().prepare(nn.Conv2d(1, 1, 1))),
        ("momentum_factor=1", lambda: ManifoldMethod(momentum_factor=1.0)),
        (
            "method.stiefel: 0.wieght matches.*did you mean '0.weight'",
            lambda: ManifoldMethod(stiefel=["0.wieght"]).prepare(net()),
        ),
        (
            "matches 0.weight, which is on the stiefel",
            lambda: ManifoldMethod(stiefel=["0"], sphere=["0"]).prepare(net()),
        ),
        (
            "0.weight is on a manifold and needs float32, not bfloat16.*bf16-mixed",
            lambda: ManifoldMethod(stiefel=["0.weight"]).build_optimizer(net().bfloat16(), BODIES["sgd"]),
        ),
        ("no weight of this model is on a manifold", lambda: ManifoldMethod().param_groups(net())),
    ],
)
def test_mistakes_are_told_in_one_line(message: str, make: Any) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert re.search(message, f"{caught.value} {caught.value.hint}"), (str(caught.value), caught.value.hint)


# -- training --------------------------------------------------------------------------------------------------------


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(16, 12, generator=generator)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


BODIES = {"sgd": partial(SGD, lr=0.05, momentum=0.9), "adamw": partial(AdamW, lr=0.01, weight_decay=0.1)}


def test_head_learning_rates() -> None:
    def rates(method: GCR, body: str) -> list[float]:
        return [g["lr"] for g in method.build_optimizer(method.prepare(net()), BODIES[body]).param_groups]

    assert rates(GCR(k=2), "sgd") == [0.05, 0.05]
    assert rates(GCR(k=2), "adamw") == [0.01, 0.1]
    assert rates(GCR(k=2, head_lr=0.3), "adamw") == [0.01, 0.3]
    groups = GCR(k=2, variant="release").build_optimizer(GCR(k=2).prepare(net()), BODIES["adamw"]).param_groups
    assert groups[1]["reorthonormalize_every"] == 1 and groups[1]["transport"] == "ambient"
    assert "weight_decay" not in groups[1]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_continues_bit_for_bit(variant: Any, body: str) -> None:
    method = GCR(k=[1, 2, 3, 2, 1], variant=variant)
    model = method.prepare(net())
    optimizer = method.build_optimizer(model, BODIES[body])
    train(model, optimizer, range(6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other_method = GCR(k=[1, 2, 3, 2, 1], variant=variant)
    other = other_method.prepare(net())
    other_optimizer = other_method.build_optimizer(other, BODIES[body])
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(6, 15))
    train(other, other_optimizer, range(6, 15))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert error(model[2]) < 2e-6


def test_copies_and_averages_keep_the_mark() -> None:
    method = GCR(k=2)
    model = method.prepare(net())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = method.build_optimizer(model, BODIES["sgd"])
    for i in range(10):
        train(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
    assert error(average.module[2]) > 1e-5  # a mean of points is no point,
    for group in method.param_groups(average.module):
        for _, p in group["params"] if "manifold" in group else ():
            place(p, group["manifold"], blocks=group["blocks"])  # but has a nearest one,
    assert error(average.module[2]) < 2e-6
    for copied in (copy.deepcopy(model), average.module):
        again = GCR(k=2)
        train(copied, again.build_optimizer(copied, BODIES["adamw"]), range(10))
        assert error(copied[2]) < 2e-6  # and both train on as subspaces


def test_any_weight_on_a_manifold_beside_the_head() -> None:
    method = GCR(k=2, stiefel=["^0.weight"])
    model = method.prepare(net())
    optimizer = method.build_optimizer(model, BODIES["adamw"])
    assert [g.get("manifold") for g in optimizer.param_groups] == [None, "grassmann", "stiefel"]
    train(model, optimizer, range(20))
    assert Grassmann().check(model[0].weight.detach()) < 2e-6
    assert model[0].weight.shape == (16, 12) and method.metrics()["orthonormality"] < 2e-6
    assert method.metrics()["k"] == 2


@pytest.mark.parametrize("kind", ["grassmann", "stiefel", "sphere"])
def test_weights_are_moved_to_the_nearest_point(kind: Any) -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 4, 3, 3)
    W[5] = W[4]  # rank-deficient
    free = W.clone()
    place(W, kind)
    rows = W.reshape(6, -1)
    if kind == "sphere":
        torch.testing.assert_close(rows, nn.functional.normalize(free.reshape(6, -1), dim=-1))
    else:
        torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-6)
        assert ((rows - free.reshape(6, -1)) ** 2).sum() < (
            (torch.linalg.qr(free.reshape(6, -1).T)[0].T - free.reshape(6, -1)) ** 2
        ).sum()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_digits_are_learnt(k: int) -> None:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    tr, te = order[:1400], order[1400:]
    method = GCR(k=k)
    model = method.prepare(build_small_cnn(width=8, data_shape=(1, 8, 8), data_classes=10))
    optimizer = method.build_optimizer(model, partial(SGD, lr=0.1, momentum=0.9))
    for i in range(150):
        rows = tr[(torch.arange(100) + 100 * i) % 1400]
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    accuracy = (model(x[te]).argmax(-1) == y[te]).float().mean().item()
    assert accuracy > 0.95
    assert error(find_head(model)[1]) < 2e-6
