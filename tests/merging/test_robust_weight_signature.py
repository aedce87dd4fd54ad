"""Robust weight signatures: the literal equations, what they must not touch, taking a patch off again, the digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contracts.merging import SHAPES, MergeContract, State, experts
from reference import merging_alignment_literal as literal
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging import merge_state_dicts
from subspace_lab.merging.architectures import layer_groups
from subspace_lab.merging.files import merge_files
from subspace_lab.merging.robust_weight_signature import RobustWeightSignature, quantise, roles, signature
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.merging.sources import StateDicts
from subspace_lab.models.convolutional import build_small_cnn
from subspace_lab.models.mlp import build_mlp
from subspace_lab.models.small_vit import build_small_vit

EVERYTHING = [""]


class TestPatchContract(MergeContract):
    ordered = True  # the first model is the clean one

    @override
    def build(self) -> RobustWeightSignature:
        return RobustWeightSignature(targets=EVERYTHING)


class TestApplyContract(MergeContract):
    @override
    def build(self) -> RobustWeightSignature:
        return RobustWeightSignature("apply", targets=EVERYTHING)

    @override
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_models_equal_to_the_base_give_the_base(self, dtype: torch.dtype) -> None:
        """Signatures are what is added: of zeros, they add nothing."""
        base, models = self.experts(dtype=dtype)
        merged = self.merge(base, [base] + [{n: torch.zeros_like(W) for n, W in base.items()}] * (len(models) - 1))
        assert all(torch.equal(merged[name], W) for name, W in base.items())

    @override
    def test_one_tensor_of_one_model_unchanged(self) -> None:
        """A tensor that has no signature."""
        base, models = self.experts()
        for found in models[1:]:
            found["down.weight"] = torch.zeros_like(base["down.weight"])
        merged = self.merge(base, models)
        torch.testing.assert_close(merged["down.weight"], models[0]["down.weight"], rtol=1e-6, atol=1e-7)


def doubles(count: int = 4) -> tuple[State, list[State]]:
    return experts(SHAPES, count, torch.float64)


@pytest.mark.parametrize("strength", [1.0, 0.5, [0.2, 1.5, 1.0]], ids=str)
def test_patch_equals_the_literal_equations(strength: Any) -> None:
    base, models = doubles()
    merged = merge_state_dicts(RobustWeightSignature(strength=strength, targets=EVERYTHING), base, models)
    strengths = strength if isinstance(strength, list) else [strength] * 3
    for name, W in merged.items():
        pre, clean, *robust = (found[name].numpy() for found in (base, *models))
        assert np.abs(W.numpy() - literal.patched(pre, clean, robust, strengths)).max() <= 1e-12, name


def test_release_has_the_square_of_its_strength_by_the_number_of_corruptions() -> None:
    base, models = doubles()
    for alpha in (1.0, 0.5, 2.0):
        method = RobustWeightSignature(strength=alpha, targets=EVERYTHING, variant="release")
        merged = merge_state_dicts(method, base, models)
        for name, W in merged.items():
            pre, clean, *robust = (found[name].numpy() for found in (base, *models))
            assert np.abs(W.numpy() - literal.released(pre, clean, robust, alpha)).max() <= 1e-12, name
        paper = RobustWeightSignature(strength=(alpha / 3) ** 2, targets=EVERYTHING)
        for name, W in merge_state_dicts(paper, base, models).items():
            assert (W - merged[name]).abs().max() <= 1e-12


def test_a_signature_is_orthogonal_to_what_was_learnt_from_clean_data() -> None:
    base, models = experts(SHAPES, 2)
    found = merge_state_dicts(RobustWeightSignature("extract", targets=EVERYTHING), base, models)
    for name, RWS in found.items():
        a, d = models[0][name].double() - base[name].double(), models[1][name].double() - base[name].double()
        assert (RWS * a).sum().abs() <= 1e-5 * RWS.norm() * a.norm(), name
        assert RWS.norm() <= d.norm() * (1 + 1e-6)
        assert RWS.norm() > 0.5 * d.norm()
    ones = torch.ones(2, 6)
    assert torch.equal(signature(ones, torch.zeros(2, 6)), ones)
    assert signature(ones, 3 * ones).abs().max() <= 1e-6


def test_strength_is_linear() -> None:
    base, models = doubles(2)

    def patch(strength: float) -> State:
        merged = merge_state_dicts(RobustWeightSignature(strength=strength, targets=EVERYTHING), base, models)
        return {name: W - models[0][name] for name, W in merged.items()}

    none, half, one, two = (patch(strength) for strength in (0.0, 0.5, 1.0, 2.0))
    for name in base:
        assert none[name].abs().max() <= 1e-15
        torch.testing.assert_close(half[name] * 2, one[name], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(one[name] * 2, two[name], rtol=1e-10, atol=1e-14)


def cnn(seed: int, size: float = 0.05, start: State | None = None) -> State:
    torch.manual_seed(seed)
    state = {
        name: W.clone()
        for name, W in build_small_cnn(width=4, data_shape=(1, 8, 8), data_classes=5).state_dict().items()
    }
    start = state if start is None else start
    return {
        name: W + size * torch.randn(W.shape) * (0.1 if name.endswith("running_var") else 1)
        if W.is_floating_point()
        else W
        for name, W in start.items()
    }


@pytest.mark.parametrize("options", [{}, {"normalization": "clean"}, {"quantize": "linear"}, {"keep_num": 2}], ids=str)
def test_extracted_applied_and_removed(options: dict[str, Any]) -> None:
    """Applying what was extracted is patching; removing it gives the clean network back."""
    base = cnn(0)
    clean, robust = cnn(1, start=base), cnn(2, start=base)
    taken = merge_state_dicts(RobustWeightSignature("extract", **options), base, [clean, robust])
    patched = merge_state_dicts(RobustWeightSignature(**options), base, [clean, robust])
    rest = {name: value for name, value in options.items() if name == "normalization"}
    applied = merge_state_dicts(RobustWeightSignature("apply", **rest), clean, [clean, taken])
    restored = merge_state_dicts(RobustWeightSignature("remove", **rest), applied, [applied, taken])
    changed = {name for name, W in patched.items() if not torch.equal(W, clean[name])}
    assert changed
    for name, W in clean.items():
        if W.is_floating_point():
            torch.testing.assert_close(applied[name], patched[name], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(restored[name], W, rtol=2e-7, atol=2e-7)
            assert (name in changed) == bool(taken[name].any()), name
    # A signature fits another network of the same shapes, which keeps what it has otherwise.
    other = cnn(3)
    moved = merge_state_dicts(RobustWeightSignature("apply", strength=0.5, **rest), other, [other, taken])
    for name in changed:
        torch.testing.assert_close(moved[name] - other[name], 0.5 * taken[name], rtol=1e-3, atol=2e-7)


def test_a_signature_is_a_file_of_its_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = cnn(0)
    for name, state in (("base", base), ("clean", cnn(1, start=base)), ("robust", cnn(2, start=base))):
        save_file({n: W.contiguous() for n, W in state.items()}, tmp_path / f"{name}.safetensors")

    def merge(action: Any, output: str, *models: str, start: str | None = None) -> State:
        settings = MergeSettings(
            models=[str(tmp_path / name) for name in models], base=None if start is None else str(tmp_path / start)
        )
        merge_files(RobustWeightSignature(action), settings, tmp_path / output, lambda line: None)
        return load_file(tmp_path / output / "model.safetensors")

    pair = ("clean.safetensors", "robust.safetensors")
    patched = merge("patch", "patched", *pair, start="base.safetensors")
    merge("extract", "signature", *pair, start="base.safetensors")
    applied = merge("apply", "applied", "clean.safetensors", "signature")
    restored = merge("remove", "restored", "applied", "signature")
    clean = load_file(tmp_path / "clean.safetensors")
    for name, W in clean.items():
        torch.testing.assert_close(applied[name], patched[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(restored[name], W, rtol=2e-7, atol=2e-7)
    with pytest.raises(UserError, match="base"):
        merge("patch", "nothing", *pair)


def test_normalisation_is_the_mean_of_the_robust_networks() -> None:
    base = cnn(0)
    clean, *robust = (cnn(seed, start=base) for seed in (1, 2, 3))
    merged = merge_state_dicts(RobustWeightSignature(), base, [clean, *robust])
    kept = merge_state_dicts(RobustWeightSignature(normalization="clean"), base, [clean, *robust])
    off = merge_state_dicts(RobustWeightSignature(strength=0.0), base, [clean, *robust])
    for name in ("1.weight", "1.bias", "5.running_mean", "9.running_var"):
        torch.testing.assert_close(merged[name], (robust[0][name] + robust[1][name]) / 2, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(kept[name], clean[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(off[name], clean[name], rtol=1e-6, atol=1e-7)
    for found in (merged, kept):
        torch.testing.assert_close(found["13.weight"], clean["13.weight"], rtol=1e-6, atol=1e-7)
        assert (found["0.weight"] - clean["0.weight"]).norm() > 0.1


def test_which_layers_come_first() -> None:
    def groups(model: torch.nn.Module) -> list[list[str]]:
        return layer_groups(StateDicts(model.state_dict(), []).infos())

    assert groups(build_mlp(hidden=[4] * 12, data_shape=(1, 2, 2), data_classes=3))[9:11] == [
        ["19.weight", "19.bias"],
        ["21.weight", "21.bias"],
    ]
    assert groups(build_small_cnn(width=4, data_shape=(1, 8, 8), data_classes=5)) == [
        ["0.weight"],
        ["4.weight"],
        ["8.weight"],
    ]
    vit = groups(build_small_vit(dim=16, depth=11, data_shape=(1, 8, 8), data_classes=5))
    assert vit[0] == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert len(vit) == 12
    assert all(name.startswith("blocks.10.") for name in vit[-1])


def test_a_residual_network_has_its_stem_and_blocks() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=4)
    infos = StateDicts(model.state_dict(), []).infos()
    found = roles(infos, 3, None, "robust")
    chosen = {name for name, role in found.items() if role == "signature"}
    assert chosen == {"conv1.weight", *(f"layer1.{b}.conv{k}.weight" for b in (0, 1) for k in (1, 2, 3))}
    averaged = {name for name, role in found.items() if role == "normalisation"}
    assert {
        "bn1.weight",
        "layer4.0.bn2.running_var",
        "layer1.0.downsample.0.weight",
        "layer4.0.downsample.1.bias",
    } < averaged
    assert {name for name, role in found.items() if role == "kept"} == {
        *(f"layer{s}.0.conv{k}.weight" for s in (2, 3, 4) for k in (1, 2, 3)), "fc.weight", "fc.bias"
    }  # fmt: skip
    everything = roles(infos, None, None, "clean")
    assert everything["layer4.0.conv3.weight"] == "signature"
    assert everything["bn1.weight"] == everything["fc.weight"] == "kept"
    only = roles(infos, 7, [r"layer3\..*conv2"], "robust")
    assert [name for name, role in only.items() if role == "signature"] == ["layer3.0.conv2.weight"]


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_values_equal_the_literal_ones(scheme: Any, bits: int) -> None:
    x = 0.02 * torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    found = quantise(x, bits, scheme)
    for given, W in zip(x, found, strict=True):
        assert np.abs(W.numpy() - literal.quantised(given.numpy(), bits, scheme)).max() <= 1e-12
        assert len(W.unique()) <= 2**bits
    error = [float((quantise(x, b, scheme) - x).norm() / x.norm()) for b in (2, 4, 8, 12)]
    assert error == sorted(error, reverse=True)
    assert error[-1] < 2e-3


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
def test_quantising_what_has_no_range(scheme: Any) -> None:
    """Zeros, constants, zeros among other numbers, one entry, numbers whose tanh is 1."""
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.0, 0.5, -0.5], [-40.0, 0.0, 40.0]])
    found = quantise(rows, 4, scheme)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], rows[0])
    torch.testing.assert_close(found[1], rows[1])
    if scheme == "log":
        torch.testing.assert_close(found, rows)
    assert quantise(torch.tensor([[0.7]]), 2, scheme) == pytest.approx(0.7, rel=1e-5)
    assert quantise(torch.zeros(2, 0), 2, scheme).shape == (2, 0)


def test_what_cannot_be() -> None:
    base, models = experts(SHAPES, 3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep_num": 0}, r"method\.keep_num=0"),
        ({"bits": 1}, r"method\.bits=1"),
        ({"targets": ["("]}, r"method\.targets: '\(' is no regular expression"),
        ({"targets": ["nowhere"]}, "no tensor has such a name"),
        ({"strength": [1.0]}, "method.strength has 1 numbers for 2 signatures"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            merge_state_dicts(RobustWeightSignature(**options), base, models)
    assert RobustWeightSignature("patch").needs_base
    assert not RobustWeightSignature("remove").needs_base


def test_figures_say_how_large_the_patch_is() -> None:
    base, models = experts(SHAPES, 2)
    method = RobustWeightSignature(targets=["weight"], strength=2.0)
    merged = merge_state_dicts(method, base, models)
    names = [name for name in base if "weight" in name]

    def size(of: Sequence[Tensor]) -> float:
        return math.sqrt(sum(float(W.square().sum()) for W in of))

    expected = size([merged[n] - models[0][n] for n in names]) / size([models[0][n] - base[n] for n in names])
    assert method.metrics() == pytest.approx(
        {"signature/tensors": len(names), "signature/relative_norm": expected}, rel=1e-4
    )


def noisy_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """250 images to pretrain on, 830 to fine-tune on, the others as they are and with Gaussian noise of .5."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    before, after, test = order.tensor_split([250, 1080])
    noise = 0.5 * torch.randn(x[test].shape, generator=torch.Generator().manual_seed(5))
    return {
        "before": (x[before], y[before]),
        "after": (x[after], y[after]),
        "clean": (x[test], y[test]),
        "noisy": (x[test] + noise, y[test]),
    }


def fit(model: torch.nn.Module, x: Tensor, y: Tensor, noise: float, epochs: int, lr: float, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            seen = x[rows] + noise * torch.randn(x[rows].shape, generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model((seen - 0.305) / 0.376), y[rows]).backward()
            optimizer.step()
    return {name: W.clone() for name, W in model.eval().state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_patch_makes_the_clean_network_robust(seed: int) -> None:
    """Measured, images as they are / noisy: clean 98.6 / 34.0, patched 93.4 / 57.3, robust 90.9 / 66.8; seed 1:
    98.2 / 23.0, 96.0 / 60.1, 92.6 / 63.3.
    """
    torch.set_num_threads(1)
    data = noisy_digits()
    torch.manual_seed(seed)
    model = build_small_cnn(width=16, data_shape=(1, 8, 8), data_classes=10)
    base = fit(model, *data["before"], 0.0, 20, 3e-3, seed)
    tuned = []
    for noise in (0.0, 0.5):
        model.load_state_dict(base)
        tuned.append(fit(model, *data["after"], noise, 12, 1e-3, seed + 10))

    def accuracy(weights: State, part: str) -> float:
        x, y = data[part]
        with torch.no_grad():
            found = torch.func.functional_call(model, weights, ((x - 0.305) / 0.376,)).argmax(1)
        return float((found == y).float().mean())

    def both(weights: State) -> tuple[float, float]:
        return accuracy(weights, "clean"), accuracy(weights, "noisy")

    clean, robust = both(tuned[0]), both(tuned[1])
    assert clean[0] > 0.96
    assert clean[1] < robust[1] - 0.2
    patched = merge_state_dicts(RobustWeightSignature(), base, tuned)
    half = merge_state_dicts(RobustWeightSignature(strength=0.5), base, tuned)
    small = merge_state_dicts(RobustWeightSignature(quantize="linear", bits=4), base, tuned)
    assert both(patched)[1] > clean[1] + 0.2
    assert both(patched)[1] > robust[1] - 0.15
    assert both(patched)[0] > robust[0]
    assert both(half)[1] > clean[1] + 0.15
    assert both(small)[1] > both(patched)[1] - 0.06
    taken = merge_state_dicts(RobustWeightSignature("extract"), base, tuned)
    applied = merge_state_dicts(RobustWeightSignature("apply"), tuned[0], [tuned[0], taken])
    restored = merge_state_dicts(RobustWeightSignature("remove"), applied, [applied, taken])
    assert both(applied) == pytest.approx(both(patched), abs=2e-3)
    assert both(restored) == pytest.approx(clean, abs=2e-3)
