"""From a picture to what a network sees: timm's and torchvision's transforms by name, for training and evaluation."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Augment = Literal["none", "crop_flip", "random_resized_crop", "rand_augment", "three_augment"]
Interpolation = Literal["bilinear", "bicubic"]
Transform = Callable[["Image.Image"], Tensor]


@dataclass(frozen=True)
class Looks:
    """How pictures are presented.

    Attributes:
        size: (height, width) of the result.
        mean: of each channel, in units of white.
        std: likewise.
        interpolation: of resizing.
        crop_ratio: the side of the evaluated centre crop relative to the resized picture's shorter side.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    crop_ratio: float

    def evaluation(self) -> Transform:
        """Resize, take the centre, normalise."""
        from timm.data.transforms_factory import transforms_imagenet_eval

        return _typed(
            transforms_imagenet_eval(
                img_size=self.size,
                crop_pct=self.crop_ratio,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
            )
        )

    def training(self, augment: Augment, magnitude: int, erasing: float) -> Transform:
        """Augment and normalise, drawing from Python's, numpy's and torch's CPU generators.

        Args:
            augment: crop_flip: the picture resized, padded by an eighth of its size, cut out at random and mirrored
                half of the time. random_resized_crop: 8 to 100 % of the area, mirrored half of the time.
                rand_augment: that, and two random operations (Cubuk et al. 2020, arXiv 1909.13719; timm's increasing
                variant with noise 0.5). three_augment: that, and one of solarising, greying and blurring, and colour
                jitter 0.3 (Touvron et al. 2022, arXiv 2204.07118).
            magnitude: of rand_augment's operations, 0 to 10.
            erasing: how often a rectangle is replaced by noise (Zhong et al. 2020, arXiv 1708.04896).
        """
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms_factory import transforms_imagenet_train
        from torchvision import transforms

        if augment in ("none", "crop_flip"):
            steps: list[Any] = [self.evaluation()]
            if augment == "crop_flip":
                resize = transforms.InterpolationMode(self.interpolation)
                steps = [
                    transforms.Resize(min(self.size), resize),
                    transforms.RandomCrop(self.size, padding=min(self.size) // 8),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(self.mean, self.std),
                ]
            if erasing:
                steps.append(
                    RandomErasing(erasing, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
                )
            return _typed(transforms.Compose(steps))
        names = {"rand_augment": f"rand-m{magnitude}-mstd0.5-inc1", "three_augment": "3a"}
        return _typed(
            transforms_imagenet_train(
                img_size=self.size,
                color_jitter=0.3 if augment == "three_augment" else 0.0,
                auto_augment=names.get(augment),
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=erasing,
                re_mode="pixel",
            )
        )


def read_picture(path: str, channels: int) -> Image.Image:
    """Return a picture in colour (3 channels) or grey (1).

    Raises:
        UserError: no picture that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("L" if channels == 1 else "RGB")
    # What a codec finds wrong with a file comes as any of these.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason})") from error


def _typed(transform: Any) -> Transform:
    def apply(picture: Image.Image) -> Tensor:
        result: Tensor = transform(picture)
        return result

    return apply
