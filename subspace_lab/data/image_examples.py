"""Images in memory as examples: cut, resized and normalised when they are asked for, changed as their task wants it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from subspace_lab.data.changes import Change
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices
from subspace_lab.linalg.random import derive_key, random_bits

Augment = Literal["none", "crop_flip", "random_resized_crop"]
Fit = Literal["resize", "pad"]
_PAD = 4  # pixels around an image that a crop may reach into
_TRIES = 10  # of a random box to lie within the image, as in torchvision
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Look:
    """How stored images become inputs.

    Attributes:
        shape: (channels, height, width) of the inputs; grey images may become three equal channels.
        scale: float32 (channels or 1, 1, 1); a pixel p becomes p·scale + shift.
        shift: likewise: what a black pixel becomes.
        fit: how an image of another size is brought to `shape`: resized (bilinear, antialiased), or put on a black
            ground.
        augment: of training images.
    """

    shape: tuple[int, int, int]
    scale: Tensor
    shift: Tensor
    fit: Fit = "resize"
    augment: Augment = "none"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Stored pixels (b, channels, h, w) of any type to inputs float32 (b, *shape)."""
        images = pixels.float()
        height, width = self.shape[1:]
        if images.shape[2:] != (height, width):
            if self.fit == "pad":
                rows, columns = height - images.shape[2], width - images.shape[3]
                edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
                images = torch.nn.functional.pad(images, edges)
            else:
                images = torch.nn.functional.interpolate(
                    images, (height, width), mode="bilinear", antialias=True, align_corners=False
                )
        if images.shape[1] != self.shape[0]:
            images = images.expand(-1, self.shape[0], -1, -1).contiguous()
        return images.mul_(self.scale).add_(self.shift)


class ImageExamples:
    """Some rows of an image set.

    Args:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).
        rows: int64 (m,), which of them belong here.
        look: how they become inputs.
        content: names what `images` and `look` are.
        change: what is done to all inputs besides.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, rows: Tensor, look: Look, content: str, change: Change | None = None
    ) -> None:
        self.images, self.labels, self.rows = images, labels, rows
        self._look, self._content, self._change = look, content, change

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> Indices:
        """Label of each example, int64 (m,)."""
        return self.labels[self.rows].numpy()

    def chosen(self, indices: Indices, numbers: Indices, change: Change | None) -> ImageExamples:
        """Examples `indices`, of which those of class c are called `numbers[c]`, changed by `change`."""
        labels, rows = torch.from_numpy(numbers)[self.labels], self.rows[torch.from_numpy(indices)]
        return ImageExamples(self.images, labels, rows, self._look, self._content, change)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices`: `inputs` float32 (b, channels, height, width) and `labels` int64 (b,)."""
        rows = self.rows[torch.from_numpy(indices)]
        return {"inputs": self._inputs(self.images[rows]), "labels": self.labels[rows]}

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`, for training: what happens to example i depends on `seed` and `places[i]` alone."""
        if self._look.augment == "none":
            return self.batch(indices)
        rows = self.rows[torch.from_numpy(indices)]
        images = self.images[rows]
        if self._look.augment == "crop_flip":
            images = crop_flip(images, words_at(derive_key("crop_flip/1", seed), places))
        else:
            keys = [derive_key("random_resized_crop/1", seed, part) for part in range(2 * _TRIES)]
            words = torch.stack([words_at(key, places) for key in keys])
            images = random_resized_crop(images, words, self._look.shape[1:])
        return {"inputs": self._inputs(images), "labels": self.labels[rows]}

    def _inputs(self, images: Tensor) -> Tensor:
        inputs = self._look(images)
        return inputs if self._change is None else self._change(inputs, self._look.shift)

    def identity(self) -> str:
        """Hash of images, labels and what is done to them."""
        content = self._content if self._change is None else f"{self._content}, {self._change.identity()}"
        digest = hashlib.blake2b(content.encode(), digest_size=16)
        for tensor in (self.rows, self.labels[self.rows]):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def words_at(key: int, places: Indices) -> Tensor:
    """Random words number `places` (b,) of a stream, int64 in [0, 2³²); the places of a batch lie close together."""
    first = int(places.min())
    words = random_bits(key, first, int(places.max()) - first + 1)
    return words if len(words) == len(places) and np.all(np.diff(places) == 1) else words[places - first]


def crop_flip(images: Tensor, moves: Tensor) -> Tensor:
    """Move images by up to 4 pixels over a black ground and mirror every other one.

    Args:
        images: uint8 (b, channels, height, width).
        moves: int64 (b,) random words; three disjoint groups of bits give the two shifts and the mirroring.
    """
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_PAD,) * 4)
    down, right = (((moves >> shift) & 0xFFF) % (2 * _PAD + 1) for shift in (0, 12))
    y = down[:, None] + torch.arange(height)
    x = torch.arange(width).expand(count, -1)
    x = right[:, None] + torch.where((moves[:, None] >> 24) & 1 == 1, width - 1 - x, x)
    batch = torch.arange(count)[:, None, None, None]
    return padded[batch, torch.arange(channels)[None, :, None, None], y[:, None, :, None], x[:, None, None, :]]


def random_resized_crop(images: Tensor, words: Tensor, size: Sequence[int]) -> Tensor:
    """Cut a random box out of every image, bring it to one size, mirror every other one (Szegedy et al. 2015).

    The box has 8 to 100 % of the area and a ratio of 3/4 to 4/3: the first of ten draws that lies within the image,
    else the whole image.

    Args:
        images: uint8 (b, channels, h, w).
        words: int64 (20, b) random words in [0, 2³²), two for each draw.
        size: (height, width) of what is returned; bilinear, without antialiasing: meant for enlarging.

    Returns:
        float32 (b, channels, height, width), in units of the pixels.
    """
    height, width = images.shape[2:]
    a, b = words[: len(words) // 2], words[len(words) // 2 :]
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * (a & 0xFFFF) / 65536)
    low, high = map(math.log, _RATIO)
    ratio = torch.exp(low + (high - low) * (a >> 16) / 65536)
    wide, tall = (torch.round(torch.sqrt(side)).long() for side in (area * ratio, area / ratio))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.long().argmax(0)[None]
    found = fits.any(0)
    box_w, box_h, place = (values.gather(0, first)[0] for values in (wide, tall, b))
    box_w, box_h = torch.where(found, box_w, width), torch.where(found, box_h, height)
    left, top = (place & 0x7FFF) % (width - box_w + 1), ((place >> 15) & 0x7FFF) % (height - box_h + 1)
    rows = _stretched(images.float(), top, box_h, size[0], torch.zeros_like(place, dtype=torch.bool))
    return _stretched(rows.transpose(2, 3), left, box_w, size[1], (place >> 30) & 1 == 1).transpose(2, 3)


def _stretched(images: Tensor, start: Tensor, length: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """Rows `start` to `start + length` of each image brought to `size` rows, (b, channels, size, w)."""
    steps = torch.arange(size).expand(len(start), -1)
    steps = torch.where(mirrored[:, None], size - 1 - steps, steps)
    position = ((steps + 0.5) * length[:, None] / size - 0.5).clamp(min=0).minimum((length - 1)[:, None].float())
    below = position.floor().long()
    above = torch.minimum(below + 1, (length - 1)[:, None])
    share = (position - below)[:, None, :, None]

    def taken(offset: Tensor) -> Tensor:
        index = (start[:, None] + offset)[:, None, :, None]
        return images.gather(2, index.expand(-1, images.shape[1], -1, images.shape[3]))

    return taken(below).lerp(taken(above), share)
