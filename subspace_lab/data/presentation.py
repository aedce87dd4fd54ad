"""`Presentation`: how a model wants its images, so that one trained on one data set can look at another's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices
from subspace_lab.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL makes grey of colour


@dataclass(frozen=True)
class Presentation:
    """How a model wants its images.

    Attributes:
        shape: (channels, height, width).
        mean: of each channel, in units of white: subtracted.
        std: likewise: divided by.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def convert(self, images: Tensor) -> Tensor:
        """Return images of any size, grey or in colour, as the model wants them.

        Args:
            images: float32 (b, 1 or 3, h, w), white is 1.

        Returns:
            float32 (b, *shape): grey repeated or colour made grey, resized bilinearly with antialiasing (the aspect
            ratio is not kept), normalised.

        Raises:
            UserError: channels that are neither grey nor colour.
        """
        channels, size = self.shape[0], self.shape[1:]
        if images.shape[1] != channels:
            if {images.shape[1], channels} != {1, 3}:
                raise UserError(f"images of {images.shape[1]} channels for a model of {channels}: expected 1 or 3")
            if channels == 3:
                images = images.expand(-1, 3, -1, -1)
            else:
                images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
        if images.shape[2:] != size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


class PresentedExamples:
    """Images in memory as another data set's model wants them.

    Args:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).
        rows: int64 (m,), which of them belong here.
        white: the largest pixel value.
        presentation: what the model wants.
        content: names what all of this is.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, rows: Tensor, white: int, presentation: Presentation, content: str
    ) -> None:
        self._images, self._labels, self._rows = images, labels, rows
        self._white, self._presentation, self._content = white, presentation, content

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices`: `inputs` float32 (b, *presentation.shape) and `labels` int64 (b,)."""
        rows = self._rows[torch.from_numpy(indices)]
        pixels = self._images[rows].float() / self._white
        return {"inputs": self._presentation.convert(pixels), "labels": self._labels[rows]}

    def identity(self) -> str:
        """Hash of images, labels and how they are presented."""
        return hashlib.blake2b(repr([self._content, self._presentation]).encode(), digest_size=16).hexdigest()
