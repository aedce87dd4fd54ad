"""`ImageDataModule`: small image sets, whole in memory, as batches of normalised float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.data.classifying import ImageClassificationDataModule, choose_classes
from subspace_lab.data.image_examples import Augment, Fit, ImageExamples, Look
from subspace_lab.data.image_sources import KINDS, Dataset, ImageSet, load
from subspace_lab.data.presentation import Presentation, PresentedExamples
from subspace_lab.data.splits import Indices, fixed_integers, fixed_order
from subspace_lab.data.supervised import Parts
from subspace_lab.errors import UserError
from subspace_lab.training.tasks import ClassificationLoss


class ImageDataModule(ImageClassificationDataModule):
    """Images for a classifier.

    Batches are `{"inputs": float32 (b, channels, height, width), "labels": int64 (b,)}`. Splits, shuffled pixels and
    shuffled labels are the same in every run; the order of training (and what is augmented or mixed) follows the run's
    seed. With `mixup` or `cutmix` the labels of training batches are float32 (b, classes).

    Args:
        dataset: which images; see `image_sources`.
        batch_size: images per process and step.
        val_size: images held out of the training set to choose models by; 0 as in `SupervisedDataModule`.
        mean: of each channel (or of all), in units of the largest pixel value: subtracted.
        std: likewise: divided by.
        train_fraction: share of the remaining training set to train on, in (0, 1]; smaller shares lie in larger ones.
        shuffle_pixels: put the pixels of all images into one other, fixed order.
        shuffle_labels: train on labels drawn uniformly at random, once (Zhang et al. 2017); held-out and test images
            keep their own.
        augment: crop_flip: train on random crops of the image padded by 4 pixels, mirrored half of the time;
            random_resized_crop: on random boxes of it, enlarged and mirrored.
        image_size: side of the images in pixels; null is their own.
        fit: how they are brought to image_size: resize, or pad: on a black ground.
        colour: give grey images three equal channels.
        classes: keep only the images of these classes, numbered anew in this order; null keeps all.
        mixup: α of Mixup on training batches; 0 is without.
        cutmix: α of CutMix; 0 is without. With both, each batch takes one of the two at random.
        label_smoothing: share of every training label that is spread over all classes, in [0, 1).
        loss: cross_entropy, or bce: binary cross-entropy of each class by itself.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where decoded images are kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.
    """

    def __init__(
        self,
        dataset: Dataset = "digits",
        batch_size: int = 128,
        val_size: int = 144,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        train_fraction: float = 1.0,
        shuffle_pixels: bool = False,
        shuffle_labels: bool = False,
        augment: Augment = "none",
        image_size: int | None = None,
        fit: Fit = "resize",
        colour: bool = False,
        classes: Sequence[int] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        loss: ClassificationLoss = "cross_entropy",
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            val_size,
            train_fraction,
            mixup,
            cutmix,
            label_smoothing,
            loss,
            data_dir,
            cache_dir,
        )
        if dataset not in KINDS:
            raise UserError(f"data.dataset={dataset}: no such image set", hint=f"one of {', '.join(KINDS)}")
        self._kind = KINDS[dataset]
        self.shape = self._inputs_shape(image_size, fit, colour)
        self._kept: list[int] | None = None
        if classes is not None:
            self._kept = choose_classes(classes, [str(number) for number in range(self._kind.classes)], dataset)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.shape[0]) or (name == "std" and min(values) <= 0):
                positive = "positive numbers" if name == "std" else "numbers"
                raise UserError(f"data.{name}={list(values)}: expected 1 or {self.shape[0]} {positive}")
        # Two roundings in a fixed order: the same floats on every machine.
        white = self._kind.white
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        scale, shift = (v.float()[:, None, None] for v in (1 / (white * s), -m / s))
        self._look = Look(self.shape, scale, shift, fit, augment)
        self._mean, self._std = (tuple(map(float, v)) * (self.shape[0] // len(v)) for v in (mean, std))
        self._shuffle_pixels, self._shuffle_labels = shuffle_pixels, shuffle_labels

    def _inputs_shape(self, size: int | None, fit: Fit, colour: bool) -> tuple[int, int, int]:
        channels, height, width = self._kind.shape
        least = max(height, width) if fit == "pad" else 1
        if size is not None and size < least:
            hint = f"data.image_size={least}, or data.fit=resize" if fit == "pad" else "null is the images' own size"
            raise UserError(f"data.image_size={size}: expected at least {least} with data.fit={fit}", hint=hint)
        return 3 if colour else channels, size or height, size or width

    @property
    @override
    def classes(self) -> int:
        """How many classes there are, of those kept."""
        return self._kind.classes if self._kept is None else len(self._kept)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        """Numbers of the classes in the whole data set."""
        return tuple(map(str, range(self._kind.classes) if self._kept is None else self._kept))

    @property
    @override
    def presentation(self) -> Presentation:
        """How a model trained on these images wants its images."""
        return Presentation(self.shape, self._mean, self._std)

    @override
    def examples_as(self, presentation: Presentation) -> Parts:
        """These images, unaugmented, as another data set's model wants them; after `setup`."""
        if presentation == self.presentation:
            return self.parts

        def part(examples: Any) -> PresentedExamples:
            images, labels, rows = examples.images, examples.labels, examples.rows
            return PresentedExamples(images, labels, rows, self._kind.white, presentation, examples.identity())

        return Parts(part(self.parts.train), part(self.parts.validation), part(self.parts.test))

    def _found(self) -> ImageSet:
        found = load(self.dataset, self._data_dir, self._cache_dir)
        return found if self._kept is None else only_classes(found, self._kept)

    @override
    def _load(self) -> Parts:
        found = self._found()
        train, test = found.train_images, found.test_images
        if self._shuffle_pixels:
            _, height, width = self._kind.shape
            order = torch.from_numpy(fixed_order(height * width, "pixels"))
            train, test = (images.flatten(2)[:, :, order].view_as(images) for images in (train, test))
        labels = found.train_labels
        shuffled = (
            torch.from_numpy(fixed_integers(len(labels), self.classes, "labels")) if self._shuffle_labels else labels
        )
        rows, held_out = self._divide(labels.numpy())

        def part(images: Tensor, labels: Tensor, rows: Indices, name: str) -> ImageExamples:
            look = self._look
            said = [found.identity, name, self._shuffle_pixels, look.scale.tolist(), look.shift.tolist()]
            if self.shape != self._kind.shape:
                said += [self.shape, look.fit]
            return ImageExamples(images, labels, torch.from_numpy(rows), look, repr(said))

        return Parts(
            part(train, shuffled, rows, "train"),
            part(train, labels, held_out, "train"),
            part(test, found.test_labels, np.arange(len(test)), "test"),
        )

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        note = load(self.dataset, self._data_dir, self._cache_dir).note
        return super().describe() | {
            **({"kept_classes": self._kept} if self._kept is not None else {}),
            **({"note": note} if note else {}),
            "shuffle_pixels": self._shuffle_pixels,
            "shuffle_labels": self._shuffle_labels,
            "augment": self._look.augment,
        }


def only_classes(found: ImageSet, kept: list[int]) -> ImageSet:
    """Return the images of some classes, these numbered 0 … in the order given."""
    numbers = torch.full((max(int(labels.max()) for labels in (found.train_labels, found.test_labels)) + 1,), -1)
    for new, old in enumerate(kept):
        if old < len(numbers):
            numbers[old] = new
    parts: list[Tensor] = []
    for images, labels in ((found.train_images, found.train_labels), (found.test_images, found.test_labels)):
        renumbered = numbers[labels]
        mine = renumbered >= 0
        parts += [images[mine], renumbered[mine]]
    return replace(
        found,
        train_images=parts[0],
        train_labels=parts[1],
        test_images=parts[2],
        test_labels=parts[3],
        identity=f"{found.identity}, classes {kept}",
    )
