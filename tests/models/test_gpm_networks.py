"""GPM's image networks: sizes as released, no biases, and what their BatchNorm looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.gpm_networks import build_gpm_alexnet, build_gpm_lenet, build_gpm_resnet18
from subspace_lab.models.mlp import build_mlp
from subspace_lab.models.task_heads import with_task_heads

CIFAR = (3, 32, 32)
BUILDERS: dict[str, Any] = {"alexnet": build_gpm_alexnet, "lenet": build_gpm_lenet, "resnet18": build_gpm_resnet18}
# Weights of the body in the release, heads apart: convolutions and linear layers, then BatchNorm's.
BODY = {
    "alexnet": 64 * 3 * 16 + 128 * 64 * 9 + 256 * 128 * 4 + 1024 * 2048 + 2048 * 2048 + 2 * (64 + 128 + 256 + 4096),
    "lenet": 20 * 3 * 25 + 50 * 20 * 25 + 3200 * 800 + 800 * 500,
    "resnet18": 1_093_140,
}
FEATURES = {"alexnet": 2048, "lenet": 500, "resnet18": 640}


@pytest.mark.parametrize("name", BUILDERS)
def test_sizes_as_released(name: str) -> None:
    model = BUILDERS[name](data_shape=CIFAR, data_classes=10)
    assert sum(p.numel() for p in model.parameters()) == BODY[name] + FEATURES[name] * 10
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert model(torch.randn(3, *CIFAR)).shape == (3, 10)
    heads = with_task_heads(model, [5, 5])
    assert sum(p.numel() for p in heads.parameters()) == BODY[name] + FEATURES[name] * 10  # heads have no biases either


def test_the_bodys_own_arithmetic_of_the_resnet() -> None:
    width, total = 20, 27 * 20 + 40
    for inputs, outputs in ((20, 20), (20, 40), (40, 80), (80, 160)):
        total += 9 * inputs * outputs + 3 * 9 * outputs * outputs + 4 * 2 * outputs
        total += inputs * outputs + 2 * outputs if inputs != outputs else 0
    assert total == BODY["resnet18"] and width * 8 * 4 == FEATURES["resnet18"]


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_evaluation_looks_at_the_batch_only_without_running_statistics(name: str) -> None:
    x = torch.randn(6, *CIFAR)
    for running in (False, True):
        torch.manual_seed(0)
        model = BUILDERS[name](running_statistics=running, data_shape=CIFAR, data_classes=4)
        model(x)
        model.eval()
        alone, together = model(x[:3]), model(x)[:3]
        assert torch.allclose(alone, together, atol=1e-5) is running


def test_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_gpm_resnet18(width=4, data_shape=CIFAR, data_classes=4).conv1.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert float(weights[0].std()) == pytest.approx((1 / 81) ** 0.5, rel=0.2)  # torch's own spread, 1 / (3 fan_in)


def test_an_mlp_without_biases() -> None:
    model = build_mlp(hidden=[100, 100], bias=False, data_shape=(1, 28, 28), data_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 784 * 100 + 100 * 100 + 100 * 10
    assert float(model(torch.zeros(2, 1, 28, 28)).detach().abs().max()) == 0


def test_what_does_not_fit_is_said_in_one_line() -> None:
    for name, least in (("alexnet", 19), ("resnet18", 16)):
        BUILDERS[name](data_shape=(1, least, least), data_classes=3)(torch.randn(2, 1, least, least))
        with pytest.raises(UserError, match=f"model=gpm_{name} needs images of at least {least}×{least} pixels"):
            BUILDERS[name](data_shape=(1, least - 1, 40), data_classes=3)
    with pytest.raises(UserError, match=r"model\.width=0"):
        build_gpm_resnet18(width=0, data_shape=CIFAR, data_classes=3)
