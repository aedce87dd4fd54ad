"""The networks of federated orthogonal training: sizes as released, and where they are not gradient projection's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.app import compose_config
from subspace_lab.build import build_model_for
from subspace_lab.errors import UserError
from subspace_lab.models.fot_networks import build_fot_alexnet, build_fot_mlp, build_fot_resnet18
from subspace_lab.models.gpm_networks import build_gpm_alexnet
from subspace_lab.models.task_heads import with_task_heads

# All numbers of the released networks with one head, counted in the release: data's shape, classes, numbers, features
# of a head, layers that the release protects (convolutions, shortcuts and hidden layers; the MLP's shared head too).
RELEASED: dict[str, tuple[tuple[int, int, int], int, int, int, int]] = {
    "fot_mlp": ((1, 28, 28), 10, 638_810, 400, 4),
    "fot_alexnet": ((3, 32, 32), 10, 6_519_808, 2048, 5),
    "fot_resnet18": ((3, 32, 32), 10, 1_096_540, 640, 20),
    "fot_resnet18_mini": ((3, 84, 84), 5, 2_806_560, 2304, 20),
}


def configured(name: str, *overrides: str) -> Any:
    shape, classes = RELEASED[name][:2]
    cfg = compose_config([f"model={name}", "data=digits", *overrides])
    return build_model_for(cfg, {"data_shape": shape, "data_classes": classes})


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_as_released(name: str) -> None:
    shape, classes, numbers, features, protected = RELEASED[name]
    model = configured(name)
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert not list(model.buffers())  # nothing that federated averaging would have to average besides
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == protected + (name != "fot_mlp")
    assert all((layer.bias is not None) == (name == "fot_mlp") for layer in layers)
    assert layers[-1].in_features == features and model(torch.randn(2, *shape)).shape == (2, classes)
    heads = with_task_heads(model, [classes, classes])
    assert sum(p.numel() for p in heads.parameters()) == numbers + classes * (features + (name == "fot_mlp"))


def test_dropout_lies_behind_every_relu_of_the_mlp() -> None:
    model = build_fot_mlp(data_shape=(1, 4, 4), data_classes=3)
    x, places = torch.randn(64, 1, 4, 4), dict(zip(dict(model.named_children()), range(len(model)), strict=True))
    for number, rate in enumerate((0.2, 0.5, 0.5), 1):
        place = places[f"drop{number}"]
        assert isinstance(model[place - 1], nn.ReLU)
        torch.manual_seed(0)
        before = model[:place](x)
        off = (model[place](before) == 0)[before > 0].float().mean()
        assert float(off) == pytest.approx(rate, abs=0.03)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_alexnet_is_gradient_projections_without_norms() -> None:
    torch.manual_seed(1)
    ours = build_fot_alexnet(data_shape=(3, 32, 32), data_classes=7)
    torch.manual_seed(1)
    theirs = build_gpm_alexnet(data_shape=(3, 32, 32), data_classes=7)
    weights = dict(ours.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in theirs.named_parameters() if "bn" not in name)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in ours.modules())
    x = torch.randn(3, 3, 32, 32)
    ours.eval()
    assert torch.allclose(ours(x)[:1], ours(x[:1]), atol=1e-6)  # an answer is that of its own image alone


def test_batch_norm_of_mini_imagenet_looks_at_the_batch_at_hand() -> None:
    x = torch.randn(4, 3, 32, 32)
    for norm in (False, True):
        model = build_fot_resnet18(width=4, batch_norm=norm, data_shape=(3, 32, 32), data_classes=3).eval()
        assert torch.allclose(model(x[:2]), model(x)[:2], atol=1e-5) is not norm


def test_the_stride_of_the_stem_halves_what_the_stages_see() -> None:
    sizes: list[tuple[int, ...]] = []
    model: Any = build_fot_resnet18(width=2, stem_stride=2, data_shape=(3, 84, 84), data_classes=5)
    for stage in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.randn(1, 3, 84, 84))
    assert sizes == [(2, 42, 42), (2, 42, 42), (4, 21, 21), (8, 11, 11), (16, 6, 6)]


def test_biases_are_drawn_by_the_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model: Any = build_fot_mlp(data_shape=(1, 28, 28), data_classes=10)
        drawn.append(model.fc1.bias.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].std()) == pytest.approx((1 / (3 * 784)) ** 0.5, rel=0.15)  # torch's own spread


def test_what_does_not_fit_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.dropout=\[0\.5\]: expected 2 rates from 0 to below 1, one a layer"):
        build_fot_mlp(hidden=[5, 5], dropout=[0.5], data_shape=(1, 4, 4), data_classes=3)
    with pytest.raises(UserError, match=r"model\.dropout=\[1\.0\]"):
        build_fot_mlp(hidden=[5], dropout=[1.0], data_shape=(1, 4, 4), data_classes=3)
    with pytest.raises(UserError, match=r"model\.hidden=\[0\]"):
        build_fot_mlp(hidden=[0], dropout=[0.5], data_shape=(1, 4, 4), data_classes=3)
    with pytest.raises(UserError, match="model=fot_alexnet needs images of at least 19×19 pixels, not 18×40"):
        build_fot_alexnet(data_shape=(1, 18, 40), data_classes=3)
    build_fot_resnet18(width=1, stem_stride=2, data_shape=(1, 31, 31), data_classes=3)(torch.randn(2, 1, 31, 31))
    with pytest.raises(UserError, match="model=fot_resnet18 needs images of at least 31×31 pixels"):
        build_fot_resnet18(width=1, stem_stride=2, data_shape=(1, 30, 31), data_classes=3)
    with pytest.raises(UserError, match=r"model\.stem_stride=0"):
        build_fot_resnet18(stem_stride=0, data_shape=(3, 32, 32), data_classes=3)
