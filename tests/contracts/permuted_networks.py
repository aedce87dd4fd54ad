"""Networks whose hidden units can be permuted: of the repository, and as the libraries name their tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from contracts.merging import State
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.models.convolutional import build_lenet, build_resnet18, build_small_cnn
from subspace_lab.models.gpm_networks import build_gpm_alexnet, build_gpm_resnet18
from subspace_lab.models.mlp import build_mlp
from subspace_lab.models.small_vit import build_small_vit

GREY, COLOUR = (1, 8, 8), (3, 32, 32)


class VGG(nn.Module):
    """VGG with batch normalisation, narrow, its tensors named as torchvision names them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((3, 6, 6, 8, 8)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3))
        self.classifier = nn.Sequential(
            nn.Linear(72, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(8, 4, 2, 4, 16, 24, num_classes=5)


def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8,
                       patch_size=4, num_labels=5)  # fmt: skip
    model = ViTForImageClassification(config)

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = model(x).logits
            return found

    wrapped = Logits()
    wrapped.vit, wrapped.classifier = model.vit, model.classifier
    return wrapped


class LayerNormResNet(nn.Module):
    """As git re-basin's ResNets: LayerNorm over channels."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, ResNet

        class Channels(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.movedim(1, -1)).movedim(-1, 1)

        inner = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, norm_layer=Channels)
        for name, module in inner.named_children():
            self.add_module(name, module)
        self._run = lambda x: inner(x)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x)
        return y


def resnet50_like() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int | None]] = {
    "mlp": (lambda: build_mlp(hidden=[20, 16, 12], data_shape=GREY, data_classes=5), GREY, None),
    "mlp without biases": (
        lambda: build_mlp(hidden=[20] * 11, bias=False, data_shape=GREY, data_classes=5),
        GREY,
        None,
    ),
    "lenet": (lambda: build_lenet(data_shape=(1, 28, 28), data_classes=5), (1, 28, 28), None),
    "small_cnn": (lambda: build_small_cnn(width=8, data_shape=GREY, data_classes=5), GREY, None),
    "vgg13_bn": (VGG, COLOUR, None),
    "gpm_alexnet": (
        lambda: build_gpm_alexnet(running_statistics=True, data_shape=(3, 19, 19), data_classes=5),
        (3, 19, 19),
        None,
    ),
    "gpm_resnet18": (
        lambda: build_gpm_resnet18(width=4, running_statistics=True, data_shape=COLOUR, data_classes=5),
        COLOUR,
        None,
    ),
    "resnet18": (lambda: build_resnet18(data_shape=(3, 16, 16), data_classes=5), (3, 16, 16), None),
    "resnet with LayerNorm": (LayerNormResNet, COLOUR, None),
    "resnet50": (resnet50_like, COLOUR, None),
    "vit_digits": (lambda: build_small_vit(dim=16, depth=2, data_shape=GREY, data_classes=5), GREY, 4),
    "torchvision's ViT": (torchvision_vit, (3, 8, 8), 4),
    "hugging face's ViT": (hugging_face_vit, (3, 8, 8), 4),
}


def alive(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network with every number drawn anew: biases and statistics too, which start as zeros and ones."""
    torch.manual_seed(seed)
    model = build().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, W in model.state_dict().items():
        if W.is_floating_point():
            noise = torch.randn(W.shape, generator=generator)
            W.copy_(noise.abs() + 0.5 if name.endswith("running_var") else W + 0.1 * noise)
    return model


def answers(model: nn.Module, weights: State, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.func.functional_call(model, weights, (x,))
    assert isinstance(y, Tensor)
    return y
