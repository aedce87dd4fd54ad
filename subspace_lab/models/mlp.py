"""Fully connected classifiers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.initialization import initialize
from subspace_lab.models.shapes import Shape, need


def build_mlp(
    *,
    hidden: Sequence[int],
    bias: bool = True,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Sequential:
    """Linear layers with ReLU between them, on the flattened image; He-normal weights, zero biases.

    Args:
        hidden: width of each hidden layer; none is a linear classifier.
        bias: whether layers have biases.
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: a width below 1, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    if any(width < 1 for width in hidden):
        raise UserError(f"model.hidden={list(hidden)}: expected widths of at least 1")
    sizes = [math.prod(shape), *hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    initialize(model)
    return model
