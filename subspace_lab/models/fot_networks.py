"""The networks of federated orthogonal training's experiments.

Bakman et al., ICLR 2024, arXiv 2309.01289 (release: duygunuryldz/Federated_Orthogonal_Training). Two of them are those
of gradient projection memory without normalisation; the one of mini-ImageNet has BatchNorm that looks at the batch at
hand in evaluation too (no running statistics), so an answer depends on the batch that it is given in.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.gpm_networks import TORCH, alexnet, batch_norms, draw_weights, resnet18
from subspace_lab.models.shapes import Shape, need


def build_fot_mlp(
    *,
    hidden: Sequence[int] = (400, 400, 400),
    dropout: Sequence[float] = (0.2, 0.5, 0.5),
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Sequential:
    """The network of Permuted MNIST, 784-400-400-400-10 with biases: 638,810 numbers; dropout behind every ReLU.

    Args:
        hidden: width of each hidden layer.
        dropout: behind each of them, in [0, 1).
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: a width below 1, rates that are none or not one for each layer, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    if any(width < 1 for width in hidden):
        raise UserError(f"model.hidden={list(hidden)}: expected widths of at least 1")
    if len(dropout) != len(hidden) or not all(0 <= rate < 1 for rate in dropout):
        raise UserError(f"model.dropout={list(dropout)}: expected {len(hidden)} rates from 0 to below 1, one a layer")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    sizes = [math.prod(shape), *hidden]
    for number, ((inputs, outputs), rate) in enumerate(zip(itertools.pairwise(sizes), dropout, strict=True), 1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"drop{number}"] = nn.Dropout(rate)
    layers["head"] = nn.Linear(sizes[-1], classes)
    model = nn.Sequential(layers)
    draw_weights(model, TORCH)
    return model


def build_fot_alexnet(*, data_shape: Shape | None = None, data_classes: int | None = None) -> nn.Sequential:
    """The network of Split CIFAR-100: `build_gpm_alexnet` without BatchNorm, 6.5M weights.

    Args:
        data_shape: (channels, height, width) of the data, at least 19×19; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: the images are too small, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    return alexnet("fot_alexnet", shape, classes, nn.Identity, nn.Identity)


def build_fot_resnet18(
    *,
    width: int = 20,
    stem_stride: int = 1,
    batch_norm: bool = False,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """The reduced ResNet-18 of 5-Datasets, 1.1M weights, and with a stride, BatchNorm and 32 channels of mini-ImageNet.

    Args:
        width: channels of the first stage.
        stem_stride: of the first convolution.
        batch_norm: whether convolutions are followed by BatchNorm without running statistics.
        data_shape: (channels, height, width) of the data, at least 16×16 after the stem; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: a width or stride below 1, the images are too small, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    if stem_stride < 1:
        raise UserError(f"model.stem_stride={stem_stride}: expected at least 1")
    norms = batch_norms(False)[0] if batch_norm else nn.Identity
    return resnet18("fot_resnet18", shape, classes, width, norms, stem_stride)
