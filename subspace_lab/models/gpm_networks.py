"""The networks of gradient projection memory's image experiments, without biases, for images of 32×32 pixels.

Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762 (release: sahagobinda/GPM), also used by SGP, TRGP and ROGO. As in the
release, BatchNorm has no running statistics: it normalises by the batch at hand in evaluation too, so an answer depends
on the batch that it is given in; `running_statistics` changes that.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg import derive_key
from subspace_lab.models.initialization import bell_
from subspace_lab.models.shapes import Shape, need

Norms = Callable[[int], nn.Module]
"""Makes what follows a layer of so many channels."""

TORCH, _HE = 1 / 3, 2.0  # variance times fan_in


def build_gpm_alexnet(
    *, running_statistics: bool = False, data_shape: Shape | None = None, data_classes: int | None = None
) -> nn.Sequential:
    """The AlexNet-like network of Split-CIFAR-100, 6.5M weights: convolutions of 64, 128 and 256 channels, 2048-2048.

    Args:
        running_statistics: evaluate with running statistics of BatchNorm instead of the batch's own.
        data_shape: (channels, height, width) of the data, at least 19×19; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: the images are too small, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    return alexnet("gpm_alexnet", shape, classes, *batch_norms(running_statistics))


def build_gpm_lenet(*, data_shape: Shape | None = None, data_classes: int | None = None) -> nn.Sequential:
    """The LeNet of the CIFAR-100 superclasses: convolutions of 20 and 50 channels, 800-500, local response norms.

    Args:
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: no data to take the sizes from.
    """
    (channels, height, width), classes = need(data_shape, data_classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(((channels, 20), (20, 50)), 1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 5, padding=2, bias=False)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"norm{number}"] = nn.LocalResponseNorm(4, 0.001 / 9.0, 0.75, 1)
        layers[f"pool{number}"] = nn.MaxPool2d(3, 2, padding=1)
    layers["flatten"] = nn.Flatten()
    rows, columns = ((-(-size // 2) + 1) // 2 for size in (height, width))
    for number, (inputs, outputs) in enumerate(((50 * rows * columns, 800), (800, 500)), 1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs, bias=False)
        layers[f"relu{number + 2}"] = nn.ReLU()
    layers["head"] = nn.Linear(500, classes, bias=False)
    model = nn.Sequential(layers)
    draw_weights(model, _HE)
    return model


def build_gpm_resnet18(
    *,
    width: int = 20,
    running_statistics: bool = False,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """The reduced ResNet-18 of 5-Datasets: `width` to 8·`width` channels, 2×2 pixels of each as features.

    Args:
        width: channels of the first stage; 20 as published, 64 is a whole ResNet-18.
        running_statistics: evaluate with running statistics of BatchNorm instead of the batch's own.
        data_shape: (channels, height, width) of the data, at least 16×16; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: a width below 1, the images are too small, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    return resnet18("gpm_resnet18", shape, classes, width, batch_norms(running_statistics)[0])


def batch_norms(statistics: bool) -> tuple[Norms, Norms]:
    """Return BatchNorm of convolutions and of linear layers, with or without running statistics."""

    def images(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, track_running_stats=statistics)

    def features(channels: int) -> nn.Module:
        return nn.BatchNorm1d(channels, track_running_stats=statistics)

    return images, features


def alexnet(name: str, shape: Shape, classes: int, after_conv: Norms, after_linear: Norms) -> nn.Sequential:
    """The AlexNet-like network with other normalisation than BatchNorm, or none (`nn.Identity`).

    Args:
        name: of the model, for messages.
        shape: (channels, height, width) of the images, at least 19×19.
        classes: how many outputs.
        after_conv: makes what follows each convolution, given its channels.
        after_linear: likewise for linear layers.

    Raises:
        UserError: the images are too small.
    """
    channels, height, width = shape
    if min(height, width) < 19:
        raise _too_small(name, 19, height, width)
    pixels = math.prod(_after_alexnet(size) for size in (height, width))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    shapes = ((channels, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5))
    for number, (inputs, outputs, kernel, drop) in enumerate(shapes, 1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel, bias=False)
        layers[f"bn{number}"] = after_conv(outputs)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"drop{number}"] = nn.Dropout(drop)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    for number, (inputs, outputs) in enumerate(((256 * pixels, 2048), (2048, 2048)), 1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs, bias=False)
        layers[f"bn{number + 3}"] = after_linear(outputs)
        layers[f"relu{number + 3}"] = nn.ReLU()
        layers[f"drop{number + 3}"] = nn.Dropout(0.5)
    layers["head"] = nn.Linear(2048, classes, bias=False)
    model = nn.Sequential(layers)
    draw_weights(model, TORCH)
    return model


def resnet18(name: str, shape: Shape, classes: int, width: int, norms: Norms, stem_stride: int = 1) -> nn.Module:
    """The reduced ResNet-18 with other normalisation than BatchNorm, or none (`nn.Identity`).

    Args:
        name: of the model, for messages.
        shape: (channels, height, width) of the images, at least 16×16 after the stem.
        classes: how many outputs.
        width: channels of the first stage.
        norms: makes what follows each convolution, given its channels.
        stem_stride: of the first convolution.

    Raises:
        UserError: a width below 1, the images are too small.
    """
    channels, height, columns = shape
    if width < 1:
        raise UserError(f"model.width={width}: expected at least 1")
    least = 15 * stem_stride + 1
    if min(height, columns) < least:
        raise _too_small(name, least, height, columns)
    sides = (-(-height // stem_stride), -(-columns // stem_stride))
    model = _ResNet18(channels, width, norms, stem_stride, sides, classes)
    draw_weights(model, TORCH)
    return model


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norms: Norms) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norms(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norms(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norms(outputs))

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _ResNet18(nn.Module):
    def __init__(
        self, channels: int, width: int, norms: Norms, stride: int, size: tuple[int, int], classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norms(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [
            nn.Sequential(_Block(inputs, outputs, stride, norms), _Block(outputs, outputs, 1, norms))
            for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        pixels = math.prod(-(-side // 8) // 2 for side in size)
        self.linear = nn.Linear(8 * width * pixels, classes, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(nn.functional.avg_pool2d(out, 2).flatten(1))
        return logits


def _after_alexnet(size: int) -> int:
    for kernel in (4, 3, 2):
        size = (size - kernel + 1) // 2
    return size


def _too_small(name: str, least: int, height: int, width: int) -> UserError:
    return UserError(
        f"model={name} needs images of at least {least}×{least} pixels, not {height}×{width}", hint="model=mlp"
    )


def draw_weights(model: nn.Module, gain: float) -> None:
    """Draw all weights, and biases where there are any, with variance gain / fan_in, each from the key of its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = math.sqrt(gain / module.weight[0].numel())
            bell_(module.weight, std, derive_key("init/1", torch.initial_seed(), name))
            if module.bias is not None:
                bell_(module.bias, std, derive_key("init/1", torch.initial_seed(), name, "bias"))
