"""Sizes as published, weights as defined, and data that does not fit said in one line."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.convolutional import build_lenet, build_resnet18, build_small_cnn
from subspace_lab.models.initialization import bell_, he_normal_
from subspace_lab.models.mlp import build_mlp

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_parameter_counts() -> None:
    assert size(build_mlp(hidden=[200, 200], data_shape=MNIST, data_classes=10)) == 199_210
    assert size(build_mlp(hidden=[200, 200], data_shape=CIFAR, data_classes=10)) == 656_810
    assert size(build_mlp(hidden=[100, 100], data_shape=DIGITS, data_classes=10)) == 17_610
    assert size(build_lenet(data_shape=MNIST, data_classes=10)) == 44_426
    assert size(build_lenet(data_shape=CIFAR, data_classes=10)) == 62_006


def test_the_grid_of_twenty_networks() -> None:
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("subspace_lab.models.mlp.initialize", lambda model: None)
        sizes = [
            size(build_mlp(hidden=[width] * depth, data_shape=MNIST, data_classes=10))
            for depth, width in itertools.product(range(1, 6), (50, 100, 200, 400))
        ]
    assert (min(sizes), max(sizes)) == (39_760, 959_610) and len(set(sizes)) == 20


@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR])
def test_every_model_classifies_every_shape_it_takes(shape: Any) -> None:
    builders: list[Any] = [lambda **k: build_mlp(hidden=[], **k), lambda **k: build_small_cnn(width=4, **k)]
    builders += [build_lenet] if shape != DIGITS else []
    builders += [build_resnet18] if shape == CIFAR else []  # 11 M weights to draw
    for build in builders:
        model = build(data_shape=shape, data_classes=7)
        assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_weights_are_he_normal_and_biases_zero() -> None:
    torch.manual_seed(0)
    model = build_mlp(hidden=[200, 200], data_shape=MNIST, data_classes=10)
    for layer in model:
        if isinstance(layer, nn.Linear):
            assert float(layer.bias.detach().abs().max()) == 0
            weight = layer.weight.detach() * (layer.in_features / 2) ** 0.5
            n = weight.numel()
            assert abs(float(weight.mean())) < 4 / n**0.5 and abs(float(weight.var()) - 1) < 5 / n**0.5
            assert float(weight.abs().max()) < 3.47


def test_weights_follow_the_seed_and_nothing_else() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        torch.rand(seed)  # how far the generator has gone does not matter
        return [p.detach() for p in build_lenet(data_shape=MNIST, data_classes=10).parameters()]

    assert all(map(torch.equal, weights(3), weights(3)))
    assert not torch.equal(weights(3)[0], weights(4)[0])


def test_initialization_is_the_same_everywhere() -> None:
    """Golden: θ0 of a stored solution is made again from its seed; other bits would be another network."""
    weight = he_normal_(torch.empty(17, 23), key=12345)
    assert hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16] == "0174fd4b1aaa0b28"
    from subspace_lab.linalg.random import random_bits

    bits = random_bits(12345, 0, 2 * 17 * 23).tolist()
    for entry in (0, 1, 200, 390):
        halves = [h for word in bits[2 * entry : 2 * entry + 2] for h in (word >> 16, word & 0xFFFF)]
        exact = (sum(halves) - 2 * (2**16 - 1)) * (2 / 23) ** 0.5 / ((2**32 - 1) / 3) ** 0.5
        assert weight.flatten()[entry].item() == pytest.approx(exact, rel=2e-7)


def test_initialization_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bell_(torch.empty(1000), 0.02, 7)
    monkeypatch.setattr("subspace_lab.models.initialization._CHUNK", 64)
    assert torch.equal(bell_(torch.empty(10, 100), 0.02, 7).flatten(), whole)
    assert torch.equal(bell_(torch.empty(1000, dtype=torch.bfloat16), 0.02, 7), whole.bfloat16())


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model=lenet needs images of at least 16×16 pixels, not 8×8"):
        build_lenet(data_shape=DIGITS, data_classes=10)
    with pytest.raises(UserError, match=r"model\.hidden=\[10, 0\]"):
        build_mlp(hidden=[10, 0], data_shape=DIGITS, data_classes=10)
    with pytest.raises(UserError, match=r"model\.width=0"):
        build_small_cnn(width=0, data_shape=DIGITS, data_classes=10)
    with pytest.raises(UserError, match=r"classifies images.*data=digits"):
        build_mlp(hidden=[10])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("mlp", "stdlib_text", "this model is for images, and the data are running text"),
        ("llama_tiny", "digits", "this model is for running text, and the data are images"),
        ("bert_tiny", "digits", "this model is for labelled sentences, and the data are images"),
    ],
)
def test_models_and_data_of_different_kinds(model: str, data: str, message: str) -> None:
    from subspace_lab import build
    from subspace_lab.app import compose_config

    cfg = compose_config([f"model={model}", f"data={data}", "method=none", "paths.output_dir=."])
    with pytest.raises(UserError, match=message):
        build.build_model(cfg, build.build_data(cfg))
