"""Fixed changes of images that make another task of the same data: pixels in another order, images turned."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

from subspace_lab.data.splits import fixed_order


class Change(Protocol):
    """What happens to every image of a task, in training and in evaluation."""

    def __call__(self, inputs: Tensor, black: Tensor) -> Tensor:
        """Return changed images.

        Args:
            inputs: float32 (b, channels, height, width), normalised.
            black: (channels or 1, 1, 1), what a black pixel is in them.

        Returns:
            float32 (b, channels, height, width).
        """
        ...

    def identity(self) -> str:
        """Name of the change, with a hash of what it is."""
        ...


class PixelOrder:
    """Pixels in one other order, the same for all images and all channels.

    (Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et al. 2017, arXiv 1612.00796.)

    Args:
        height: of the images.
        width: likewise.
        purpose: which of all orders; the order is a function of these three.
    """

    def __init__(self, height: int, width: int, purpose: str) -> None:
        self.order = torch.from_numpy(fixed_order(height * width, purpose))

    def __call__(self, inputs: Tensor, black: Tensor) -> Tensor:
        """Return images whose pixel k is pixel `order[k]` of the given ones."""
        flat = inputs.flatten(2)
        return flat.index_select(2, self.order).view_as(inputs)

    def identity(self) -> str:
        """Hash of the order."""
        return f"permutation {hashlib.blake2b(self.order.numpy().tobytes(), digest_size=8).hexdigest()}"


class Rotation:
    """Images turned about their centre, bilinearly, over a black ground (Lopez-Paz & Ranzato 2017, arXiv 1706.08840).

    Args:
        height: of the images.
        width: likewise.
        degrees: counterclockwise.
    """

    def __init__(self, height: int, width: int, degrees: float) -> None:
        self.degrees = float(degrees)
        # Exact quarter turns: cos(π/2) is 6e-17, which would let a neighbour shine through.
        quarters, rest = divmod(self.degrees % 360, 90)
        cosine, sine = (math.cos(math.radians(rest)), math.sin(math.radians(rest))) if rest else (1.0, 0.0)
        for _ in range(int(quarters)):
            cosine, sine = -sine, cosine
        y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
        x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
        # Rows grow downwards: where the pixel at (x, y) comes from is it turned clockwise as one sees it.
        from_x, from_y = cosine * x - sine * y, sine * x + cosine * y
        grid = torch.stack([from_x * 2 / width, from_y * 2 / height], dim=-1)
        self._grid = grid.float()[None]

    def __call__(self, inputs: Tensor, black: Tensor) -> Tensor:
        """Return the turned images; what comes from outside an image is black."""
        grid = self._grid.expand(len(inputs), -1, -1, -1)
        turned = torch.nn.functional.grid_sample(inputs - black, grid, mode="bilinear", align_corners=False)
        return turned + black

    def identity(self) -> str:
        """The angle."""
        return f"rotation {self.degrees:g}°"
