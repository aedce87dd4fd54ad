"""Small convolutional classifiers and torchvision's ResNet-18."""

from __future__ import annotations

from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.initialization import initialize
from subspace_lab.models.shapes import Shape, need

_LENET_SMALLEST = 16  # two valid 5×5 convolutions and two poolings leave one pixel of it
_STEM_SMALLEST = 64  # torchvision's stem divides the image by four before the first block


def build_lenet(*, data_shape: Shape | None = None, data_classes: int | None = None) -> nn.Sequential:
    """LeNet as in Li et al. (ICLR 2018): 6 and 16 valid 5×5 convolutions, each max-pooled, then 120-84-classes.

    Args:
        data_shape: (channels, height, width) of the data, at least 16×16; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: the images are too small, or no data to take the sizes from.
    """
    (channels, height, width), classes = need(data_shape, data_classes)
    if min(height, width) < _LENET_SMALLEST:
        raise UserError(
            f"model=lenet needs images of at least {_LENET_SMALLEST}×{_LENET_SMALLEST} pixels, not {height}×{width}",
            hint="data=mnist, or model=mlp for this data",
        )
    rows, columns = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
    initialize(model)
    return model


def build_small_cnn(
    *, width: int = 32, data_shape: Shape | None = None, data_classes: int | None = None
) -> nn.Sequential:
    """Three 3×3 convolutions with BatchNorm, of width, 2·width and 4·width channels, average pooling, one linear layer.

    Args:
        width: channels of the first convolution.
        data_shape: (channels, height, width) of the data, at least 4×4; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: a width below 1, or no data to take the sizes from.
    """
    shape, classes = need(data_shape, data_classes)
    if width < 1:
        raise UserError(f"model.width={width}: expected at least 1")
    layers: list[nn.Module] = []
    for inputs, outputs in ((shape[0], width), (width, 2 * width), (2 * width, 4 * width)):
        # The bias is BatchNorm's.
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outputs < 4 * width else []
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
    initialize(model)
    return model


def build_resnet18(*, data_shape: Shape | None = None, data_classes: int | None = None) -> nn.Module:
    """Torchvision's ResNet-18 from random initialisation; for images below 64 pixels with a 3×3 stem and no pooling.

    Args:
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: no data to take the sizes from.
    """
    (channels, height, width), classes = need(data_shape, data_classes)
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=classes)
    if min(height, width) < _STEM_SMALLEST:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    initialize(model)
    return model
