"""timm's and torchvision's classifiers: published sizes, the data's channels and classes, refusals in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.app import compose_config
from subspace_lab.build import build_model_for
from subspace_lab.errors import UserError
from subspace_lab.models.heads import find_head
from subspace_lab.models.vision import build_timm, build_torchvision, build_vgg13_bn

IMAGENET: dict[str, Any] = {"data_shape": (3, 224, 224), "data_classes": 1000}
SMALL: dict[str, Any] = {"data_shape": (3, 32, 32), "data_classes": 7}

# Parameters with 1000 classes (to 10,000: mmpretrain's model zoo), features, the head's name.
NAMED = {
    "resnet50": (25_560_000, 2048, "fc"),
    "resnet50d": (25_580_000, 2048, "fc"),
    "resnet101d": (44_570_000, 2048, "fc"),
    "resnet152d": (60_210_000, 2048, "fc"),
    "resnext50": (25_030_000, 2048, "fc"),
    "swin_t": (28_290_000, 768, "head.fc"),
    "deit3_s": (22_060_000, 384, "head"),
    "vgg13_bn": (133_050_000, 4096, "classifier.6"),
}


def build(name: str, known: dict[str, Any], *overrides: str) -> nn.Module:
    return build_model_for(compose_config([f"model={name}", "method=none", *overrides]), known)


@pytest.mark.parametrize("name", list(NAMED))
def test_named_models_are_the_published_ones(name: str) -> None:
    size, features, head = NAMED[name]
    with torch.device("meta"):
        model = build(name, IMAGENET)
    assert round(sum(p.numel() for p in model.parameters()), -4) == size
    path, layer = find_head(model)
    assert (path, layer.in_features, layer.out_features) == (head, features, 1000)


@pytest.mark.parametrize("name", [n for n in NAMED if n not in ("vgg13_bn", "resnet101d", "resnet152d")])
def test_the_head_sees_the_features_and_has_the_classes_of_the_data(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, SMALL)
    seen: list[torch.Tensor] = []
    find_head(model)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model.training  # looking whether it takes such images has not left it in evaluation
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert seen[0].shape == (2, NAMED[name][1])


def test_stochastic_depth_is_the_recipes() -> None:
    from timm.layers import DropPath

    with torch.device("meta"):
        for name, rate in (("swin_t", 0.2), ("deit3_s", 0.05)):
            rates = [m.drop_prob for m in build(name, IMAGENET).modules() if isinstance(m, DropPath)]
            assert max(rates) == pytest.approx(rate)
        assert not [m for m in build("resnet50d", IMAGENET).modules() if isinstance(m, DropPath)]
        rates = [
            m.drop_prob
            for m in build("resnet50d", IMAGENET, "model.drop_path=0.05").modules()
            if isinstance(m, DropPath)
        ]
    assert max(rates) == pytest.approx(0.05)


def test_class_subspaces_see_vgg_features_without_dropout() -> None:
    with torch.device("meta"):
        kept, dropped = (build_vgg13_bn(feature_dropout=keep, **IMAGENET) for keep in (True, False))
    assert sum(isinstance(m, nn.Dropout) for m in kept.modules()) == 2
    layers = list(dropped.classifier)  # type: ignore[arg-type]
    assert isinstance(layers[2], nn.Dropout) and not isinstance(layers[5], nn.Dropout)


def test_any_architecture_for_any_number_of_channels() -> None:
    model = build_timm(architecture="resnet18", data_shape=(1, 28, 28), data_classes=5)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    model = build_timm(architecture="vit_tiny_patch16_224", drop_path=0.1, data_shape=(2, 48, 48), data_classes=5)
    assert model(torch.randn(2, 2, 48, 48)).shape == (2, 5)
    model = build_torchvision(architecture="shufflenet_v2_x0_5", **SMALL)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_weights_follow_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [p.detach() for p in build_timm(architecture="resnet10t", **SMALL).parameters()]

    assert all(map(torch.equal, weights(1), weights(1)))
    assert not torch.equal(weights(1)[0], weights(2)[0])


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (build_timm, {"architecture": "resnet50dd"}, r"model\.architecture=resnet50dd: no such model \(.*resnet50d\b"),
        (build_timm, {"architecture": "swin_tiny"}, r"no such model \(did you mean .*swin_tiny_patch4_window7_224"),
        (build_torchvision, {"architecture": "ResNet-50"}, r"no such model \(did you mean .*\bresnet50\b"),
        (build_torchvision, {"architecture": "swin_tt"}, r"no such model \(did you mean .*\bswin_t\b"),
        (build_timm, {"architecture": "vgg11", "drop_path": 0.1}, r"vgg11 has no stochastic depth"),
        (build_torchvision, {"architecture": "resnet18", "drop_path": 0.1}, r"resnet18 has no stochastic depth"),
        (build_timm, {"architecture": "vgg11", "pretrained": "/no/such.pth"}, r"model\.pretrained=/no/such\.pth: no"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_one_line(builder: Any, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        builder(**arguments, **SMALL)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_are_one_line() -> None:
    eight: dict[str, Any] = {"data_shape": (3, 8, 8), "data_classes": 10}
    with pytest.raises(UserError, match=r"deit3_small_patch16_224 does not take images of 8×8 pixels \([^\n]*$"):
        build("deit3_s", eight)
    with pytest.raises(UserError, match=r"mnasnet0_5 takes images of 3 channels, not of 1 \(model=timm"):
        build_torchvision(architecture="mnasnet0_5", data_shape=(1, 28, 28), data_classes=10)
    with torch.device("meta"), pytest.raises(UserError, match=r"vgg13_bn does not take images of 8×8 pixels"):
        build("vgg13_bn", eight)
    with pytest.raises(UserError, match="classifies images"):
        build_timm(architecture="resnet18")


def test_weights_from_a_file_with_another_head(tmp_path: Path) -> None:
    source = build_timm(architecture="resnet10t", data_shape=(3, 32, 32), data_classes=11)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}, path)
    model = build_timm(architecture="resnet10t", pretrained=str(path), **SMALL)
    own, theirs = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own if not name.startswith("fc."))
    assert own["fc.weight"].shape == (7, 512)
    same = build_timm(architecture="resnet10t", pretrained=str(path), data_shape=(3, 32, 32), data_classes=11)
    assert torch.equal(same.state_dict()["fc.weight"], theirs["fc.weight"])


def test_weights_from_the_folder_of_a_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = build_timm(architecture="resnet10t", **SMALL).state_dict()
    weights = {name: value for name, value in source.items() if not name.startswith("fc.")}
    weights["fc.bases.k8"] = torch.randn(7, 8, 512)  # class subspaces
    (tmp_path / "export").mkdir()
    save_file(weights, tmp_path / "export" / "model.safetensors")
    model = build_timm(architecture="resnet10t", pretrained=str(tmp_path), **SMALL)
    assert torch.equal(model.state_dict()["conv1.0.weight"], source["conv1.0.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build_timm(architecture="resnet10t", **SMALL).state_dict(), path)
    with pytest.raises(UserError, match=r"weights of another architecture: \S+ is \(.*\) there"):
        build_timm(architecture="resnet14t", pretrained=str(path), **SMALL)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot be read"):
        build_torchvision(architecture="resnet18", pretrained=str(path), **SMALL)


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"the weights of resnet10t.*model\.pretrained=/a/file") as caught:
        build_timm(architecture="resnet10t", pretrained=True, **SMALL)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the weights of squeezenet1_1"):
        build_torchvision(architecture="squeezenet1_1", pretrained=True, **SMALL)


def test_importing_the_factories_imports_no_library() -> None:
    code = "import sys, subspace_lab.models.vision; print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    assert re.fullmatch(r"\[\]\s*", subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
