"""`ImageClassificationDataModule`: what image sets have in common, in memory or on the disk.

Which classes, which loss, what is mixed, and how a model of theirs wants its images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from subspace_lab.data.joined import DivisibleExamples
from subspace_lab.data.loaders import AugmentedBatches
from subspace_lab.data.mixing import MixedBatches
from subspace_lab.data.order import EpochOrder
from subspace_lab.data.packing import Batch
from subspace_lab.data.presentation import Presentation
from subspace_lab.data.supervised import Parts, SupervisedDataModule
from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.training.tasks import Classification, ClassificationLoss, Task


class ImageClassificationDataModule(SupervisedDataModule):
    """Labelled images.

    Args:
        dataset: its name, for messages and results.
        batch_size: images per process and step.
        val_size: as in `SupervisedDataModule`.
        train_fraction: as in `SupervisedDataModule`.
        mixup: α of Mixup on training batches; 0 is without.
        cutmix: α of CutMix; 0 is without. With both, each batch takes one of the two at random.
        label_smoothing: share of every training label that is spread over all classes, in [0, 1).
        loss: cross_entropy: of one class out of all. bce: binary cross-entropy of each class by itself, their mean.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where prepared data is kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.

    Attributes:
        shape: (channels, height, width) of a training image.
    """

    shape: tuple[int, int, int]

    def __init__(
        self,
        dataset: str,
        batch_size: int,
        val_size: int,
        train_fraction: float,
        mixup: float,
        cutmix: float,
        label_smoothing: float,
        loss: ClassificationLoss,
        data_dir: str | None,
        cache_dir: str | None,
    ) -> None:
        super().__init__(dataset, batch_size, val_size, train_fraction, data_dir, cache_dir)
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise UserError(f"data.{name}={alpha}: expected 0 or more")
        if (mixup or cutmix) and batch_size % 2:
            raise UserError(
                f"data.batch_size={batch_size}: Mixup and CutMix pair the images of a batch, expected an even number",
                hint=f"data.batch_size={batch_size + 1}",
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"data.label_smoothing={label_smoothing}: expected a number from 0 to below 1")
        if loss not in ("cross_entropy", "bce"):
            raise UserError(f"data.loss={loss}: no such loss", hint="cross_entropy or bce")
        self._mixup, self._cutmix = mixup, cutmix
        self._label_smoothing, self._loss = label_smoothing, loss

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes there are."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by number."""

    @property
    def outputs(self) -> int:
        """Columns that labels may name: the classes, or all columns of the sequence that this is a task of."""
        return self.classes if self._outputs is None else self._outputs

    @property
    @abstractmethod
    def presentation(self) -> Presentation:
        """How a model trained on these images wants its images."""

    @abstractmethod
    def examples_as(self, presentation: Presentation) -> Parts:
        """These images, unaugmented, as another data set's model wants them; after `setup`."""

    @override
    def model_arguments(self) -> dict[str, Any]:
        """`data_shape` (channels, height, width) and `data_classes`."""
        return {"data_shape": self.shape, "data_classes": self.outputs}

    @override
    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros, and its shape in words."""
        labels = torch.zeros(self.batch_size, dtype=torch.int64)
        if self._mixup or self._cutmix:
            labels = torch.full((self.batch_size, self.outputs), 1 / self.outputs)
        text = f"{self.batch_size} images of {'×'.join(map(str, self.shape))}"
        return {"inputs": torch.zeros(self.batch_size, *self.shape), "labels": labels}, text

    @override
    def task(self) -> Task:
        """One class out of several."""
        return Classification(self._loss, self._label_smoothing)

    @override
    def _train_batches(self, order: EpochOrder) -> Dataset[Batch]:
        batches = self._plain_batches(order)
        if not (self._mixup or self._cutmix):
            return batches
        return MixedBatches(batches, self.outputs, self._mixup, self._cutmix, order.seed, self._rank, self._world_size)

    def _plain_batches(self, order: EpochOrder) -> Dataset[Batch]:
        """Training batches before they are mixed."""
        train: DivisibleExamples = cast(DivisibleExamples, self.parts.train)
        return AugmentedBatches(train, order, self.batch_size, self._rank, self._world_size)

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        return super().describe() | {
            "shape": list(self.shape),
            "classes": self.classes,
            "mixup": self._mixup,
            "cutmix": self._cutmix,
            "label_smoothing": self._label_smoothing,
            "loss": self._loss,
        }


def choose_classes(wanted: Sequence[int | str], names: Sequence[str], dataset: str) -> list[int]:
    """Return the numbers of the classes to keep, in the order given.

    Args:
        wanted: numbers or names.
        names: of all classes.
        dataset: for messages.

    Raises:
        UserError: an unknown class, one given twice, fewer than two.
    """
    chosen: list[int] = []
    for item in wanted:
        if isinstance(item, str) and item in names:
            number = list(names).index(item)
        elif isinstance(item, int) and 0 <= item < len(names):
            number = item
        else:
            near = did_you_mean(item, names) if isinstance(item, str) else ""
            raise UserError(
                f"data.classes: {dataset} has no class {item!r}", hint=near or f"its classes are 0 … {len(names) - 1}"
            )
        if number in chosen:
            raise UserError(f"data.classes names class {item!r} twice", hint="give every class once")
        chosen.append(number)
    if len(chosen) < 2:
        raise UserError(f"data.classes={list(wanted)}: expected at least 2 classes", hint="null keeps all")
    return chosen
