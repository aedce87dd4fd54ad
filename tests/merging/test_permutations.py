"""Which units of which networks can be permuted: the same function afterwards, and matching finds them back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.permuted_networks import NETWORKS, alive, answers
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.merging import merge_state_dicts
from subspace_lab.merging.architectures import find_spec
from subspace_lab.merging.permutations import moved
from subspace_lab.merging.sources import StateDicts
from subspace_lab.merging.weight_matching import WeightMatching

DEAR = ("gpm_alexnet", "resnet18", "resnet with LayerNorm", "resnet50", "torchvision's ViT", "hugging face's ViT")


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEAR)) for name in NETWORKS]
)
def test_a_permuted_network_is_the_same_function_and_is_found_back(network: str) -> None:
    build, shape, heads = NETWORKS[network]
    model = alive(build, 0)
    state = {name: W.clone() for name, W in model.state_dict().items()}
    spec = find_spec(StateDicts(state, []).infos(), "auto", heads)
    assert {name for name, W in state.items() if W.is_floating_point()} == set(spec.axes)
    shuffled = spec.random(torch.Generator().manual_seed(1))
    assert moved(shuffled) > 0.5
    turned = spec.apply(state, shuffled)
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(2))
    before, after = answers(model, state, x), answers(model, turned, x)
    assert (before - after).abs().max() <= 8e-6 * max(1.0, float(before.abs().max()))
    assert before.std() > 1e-3
    for name, W in state.items():
        if W.dim() == 2 and W.numel() <= 10_000:
            singular = torch.linalg.svdvals(W)
            assert (singular - torch.linalg.svdvals(turned[name])).abs().max() <= 2e-6 * singular[0], name
    # Every unit is somewhere else, and matching brings each back, in whatever order layers are gone through.
    for seed in range(5 if network == "mlp" else 1):
        method = WeightMatching(heads=heads, seed=seed)
        merged = merge_state_dicts(method, state, [state, turned])
        back = spec.apply(turned, method.matchings[0].permutations)
        assert all(torch.equal(back[name], W) for name, W in state.items())
        for name, W in state.items():
            torch.testing.assert_close(merged[name], W, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "family", "units", "heads"),
    [
        ("vgg13_bn", "chain", 12, 0),
        ("resnet18", "resnet", 12, 0),
        ("resnet50", "resnet", 37, 0),
        ("vit_b_16", "vit", 25, 12),
    ],
)
def test_torchvisions_networks_in_full(architecture: str, family: str, units: int, heads: int) -> None:
    """Shapes alone: what is matched at once are layers, residual streams, and attention layers as a whole."""
    from torchvision import models

    with torch.device("meta"):
        state = models.get_model(architecture).state_dict()
    spec = find_spec(StateDicts(state, []).infos())
    assert (spec.family, len(spec.units)) == (family, units)
    assert all(group.count == heads for group in spec.heads)
    assert set(spec.axes) == {name for name, W in state.items() if W.is_floating_point()}


def test_without_a_head_features_stay() -> None:
    for network, heads in (("gpm_resnet18", None), ("vit_digits", 4)):
        build, shape, _ = NETWORKS[network]
        model: Any = alive(build, 0)
        setattr(model, "head" if network == "vit_digits" else "linear", nn.Identity())
        state = model.state_dict()
        spec = find_spec(StateDicts(state, []).infos(), "auto", heads)
        turned = spec.apply(state, spec.random(torch.Generator().manual_seed(1)))
        x = torch.randn(4, *shape)
        before, after = answers(model, dict(state), x), answers(model, turned, x)
        assert moved(spec.random(torch.Generator().manual_seed(1))) > 0.5
        assert (before - after).abs().max() <= 8e-6 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(
    ("shapes", "family", "heads", "message"),
    [
        ({"0.weight": (4, 3)}, "auto", None, "1 layers with weights have no hidden"),
        ({"0.weight": (4, 3), "1.weight": (2, 5)}, "auto", None, "1.weight reads 5 numbers, no multiple of"),
        ({"0.weight": (4, 3), "1.weight": (2, 4), "token": (1, 2)}, "auto", None, "token of shape .* no part of a"),
        ({"0.weight": (4, 3), "1.weight": (2, 4)}, "resnet", None, "no tensor of a residual network"),
        ({"0.weight": (4, 3), "1.weight": (2, 4)}, "vit", None, "no tensors of transformer blocks"),
        ({"layer1.0.conv1.weight": (4, 3, 1, 1)}, "auto", None, "no conv1.weight before"),
    ],
)  # fmt: skip
def test_networks_that_it_does_not_know(shapes: Any, family: Any, heads: int | None, message: str) -> None:
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=message) as caught:
        find_spec(StateDicts(state, []).infos(), family, heads)
    assert "method.spec" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_cannot_be_known() -> None:
    state = alive(NETWORKS["vit_digits"][0], 0).state_dict()
    for heads in (None, 3):
        with pytest.raises(UserError, match=f"method.heads={heads}"):
            find_spec(StateDicts(state, []).infos(), "auto", heads)
    with pytest.raises(UserError, match=r"method\.t=2"):
        WeightMatching(t=2)
