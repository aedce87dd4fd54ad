"""`ImageFolderDataModule`: a tree of image files, as large as the disk, read by worker processes while training."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from subspace_lab.data.augmentation import Augment, Interpolation, Looks
from subspace_lab.data.classifying import ImageClassificationDataModule, choose_classes
from subspace_lab.data.documents import hash_text
from subspace_lab.data.folder_examples import FolderExamples, RepeatedOrder
from subspace_lab.data.folder_layout import Layout
from subspace_lab.data.image_listing import Listing
from subspace_lab.data.order import EpochOrder
from subspace_lab.data.packing import Batch
from subspace_lab.data.presentation import Presentation
from subspace_lab.data.splits import Indices, fixed_order, stratified
from subspace_lab.data.supervised import Parts
from subspace_lab.errors import UserError
from subspace_lab.training.tasks import ClassificationLoss

_MOST = 10_000  # images held out where nobody says how many
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderDataModule(ImageClassificationDataModule):
    """Images in folders {train, val, test}/<class>/…, at any depth below the class folder.

    What is trained on, chosen by and reported depends on which folders there are:

    * train, val and test: as they are.
    * train and val (ImageNet): `val_size` images of train are held out to choose by; **val is the test part**.
    * train and test: `val_size` images of train are held out to choose by.
    * train alone: `val_size` images are held out to choose by and as many (or `test_share`) for the test part.

    val may be called valid or validation; a test folder without class folders (ImageNet's) counts as absent; see
    `Layout` for class folders without a train folder, and for lists of images. Images are held out each class in
    proportion, the same ones in every run. Batches are `{"inputs": float32 (b, 3, image_size, image_size), "labels":
    int64 (b,)}`, with `mixup` or `cutmix` labels float32 (b, classes). Order, augmentation and mixing are functions of
    the seed and the place in the training sequence alone.

    Args:
        dataset: its name.
        root: the folder; null is <data_dir>/<dataset>.
        batch_size: images per process and step.
        global_batch_size: images per optimizer step over all processes; the trainer reaches it by accumulation.
        val_size: images held out of train to choose models by. null: a tenth, at most 10,000. 0 trains on everything;
            validation then is a tenth (at most 10,000) of what is trained on: a curve, no evidence.
        test_share: share of the images to report on where there is neither val nor test; null: as many as val_size.
        train_fraction: share of the remaining training set to train on, in (0, 1]; smaller shares lie in larger ones.
        classes: keep only the images of these classes (names of folders, or their places in sorted order), numbered
            anew in this order; null keeps all.
        image_size: side of a training image in pixels.
        eval_size: side of an evaluated image; null is image_size.
        crop_ratio: evaluation resizes the shorter side to eval_size / crop_ratio and takes the centre.
        interpolation: of resizing.
        mean: of each channel, in units of white: subtracted.
        std: likewise: divided by.
        augment: see `Looks.training`.
        magnitude: of rand_augment's operations, 0 to 10.
        erasing: how often a rectangle of a training image is replaced by noise, in [0, 1].
        repeated_augment: how often in a row each image is taken, each time augmented anew; an epoch has as many steps
            as before and sees one image in so many.
        mixup: α of Mixup on training batches; 0 is without.
        cutmix: α of CutMix; 0 is without. With both, each batch takes one of the two at random.
        label_smoothing: share of every training label that is spread over all classes, in [0, 1).
        loss: cross_entropy, or bce: binary cross-entropy of each class by itself.
        num_workers: processes that read and augment; 0 does it between the steps. At most one for each core; any
            number gives the same batches.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where the list of files is kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.
    """

    def __init__(
        self,
        dataset: str = "image_folder",
        root: str | None = None,
        batch_size: int = 64,
        global_batch_size: int | None = None,
        val_size: int | None = None,
        test_share: float | None = None,
        train_fraction: float = 1.0,
        classes: Sequence[int | str] | None = None,
        image_size: int = 224,
        eval_size: int | None = None,
        crop_ratio: float = 0.875,
        interpolation: Interpolation = "bilinear",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augment: Augment = "random_resized_crop",
        magnitude: int = 9,
        erasing: float = 0.0,
        repeated_augment: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        loss: ClassificationLoss = "cross_entropy",
        num_workers: int = 4,
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            val_size or 0,
            train_fraction,
            mixup,
            cutmix,
            label_smoothing,
            loss,
            data_dir,
            cache_dir,
        )
        for name, number, least in (
            ("image_size", image_size, 1),
            ("eval_size", eval_size or 1, 1),
            ("repeated_augment", repeated_augment, 1),
            ("num_workers", num_workers, 0),
        ):
            if number < least:
                raise UserError(f"data.{name}={number}: expected at least {least}")
        shares = (("crop_ratio", crop_ratio), ("erasing", erasing), ("test_share", test_share or 0.0))
        for name, share in shares:
            if not 0 <= share <= 1 or (name == "crop_ratio" and not share):
                raise UserError(f"data.{name}={share}: expected a number from 0 to 1")
        if not 0 <= magnitude <= 10:
            raise UserError(f"data.magnitude={magnitude}: expected 0 to 10")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"data.mean={list(mean)} data.std={list(std)}: expected 3 numbers each, std above 0")
        self.global_batch_size, self.shape = global_batch_size, (3, image_size, image_size)
        self._wanted_val, self._test_share, self._wanted_classes = val_size, test_share, classes
        self.num_workers = min(num_workers, len(os.sched_getaffinity(0)))
        self._root = Path(root).expanduser() if root else self._data_dir / dataset
        self._layout = Layout(self._root, dataset, self._cache_dir)
        self._eval_size, self._augment, self._magnitude = eval_size or image_size, augment, magnitude
        self._erasing, self._repeats = erasing, repeated_augment
        self._mean, self._std = tuple(map(float, mean)), tuple(map(float, std))
        self._interpolation, self._crop_ratio = interpolation, crop_ratio
        self._sources: dict[str, str] = {}

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that are kept, by number; looks at the names of the folders."""
        return tuple(self._layout.names[old] for old in self._kept)

    @functools.cached_property
    def _kept(self) -> list[int]:
        if self._wanted_classes is None:
            return list(range(len(self._layout.names)))
        return choose_classes(self._wanted_classes, self._layout.names, self.dataset)

    @property
    @override
    def classes(self) -> int:
        """How many classes there are, of those kept; looks at the names of the folders."""
        return len(self._kept)

    @property
    @override
    def presentation(self) -> Presentation:
        """How a model trained on these images wants its images, of the size that evaluation has."""
        return Presentation((3, self._eval_size, self._eval_size), self._mean, self._std)

    def _looks(self, presentation: Presentation) -> Looks:
        return Looks(presentation.shape[1:], presentation.mean, presentation.std, self._interpolation, self._crop_ratio)

    @override
    def examples_as(self, presentation: Presentation) -> Parts:
        """These images, unaugmented, as another data set's model wants them; after `setup`.

        They are resized and cut as for evaluation (`crop_ratio`), to the other model's size.
        """
        looks = self._looks(presentation)
        transform, channels = looks.evaluation(), presentation.shape[0]

        def part(examples: Any) -> FolderExamples:
            found: FolderExamples = examples.presented(transform, channels, repr([looks, channels]))
            return found

        return Parts(part(self.parts.train), part(self.parts.validation), part(self.parts.test))

    @override
    def _load(self) -> Parts:
        train, labels = self._part("train")
        val_folder, has_test = self._layout.validation, self._layout.has_test
        rows = np.flatnonzero(labels >= 0)
        looks = self._looks(self.presentation)
        transform = looks.evaluation()
        training = Looks(self.shape[1:], self._mean, self._std, self._interpolation, self._crop_ratio).training(
            self._augment, self._magnitude, self._erasing
        )
        black = -torch.tensor(self._mean)[:, None, None] / torch.tensor(self._std)[:, None, None]

        def part(listed: Listing, labels: Indices, rows: Indices) -> FolderExamples:
            return FolderExamples(listed, labels, rows, transform, 3, repr([looks, 3]), training, None, black)

        def whole(name: str) -> FolderExamples:
            listed, labels = self._part(name)
            return part(listed, labels, np.flatnonzero(labels >= 0))

        held_out = "train, held out" if self._wanted_val != 0 else "train, trained on"
        self._sources = {"train": "train", "validation": held_out}
        if val_folder and has_test:
            if self._wanted_val is not None:
                raise UserError(
                    f"data.val_size={self._wanted_val}: {self._root} has a validation folder of its own ({val_folder})",
                    hint="data.val_size=null",
                )
            validation, test = whole(val_folder), whole("test")
            self._sources |= {"validation": val_folder, "test": "test"}
            self._val_size = len(validation)
            return Parts(part(train, labels, self._fraction(rows)), validation, test)
        wanted = min(_MOST, max(1, len(rows) // 10)) if self._wanted_val is None else self._wanted_val
        self._val_size = wanted
        self._sources["test"] = "test" if has_test else val_folder or "train, held out"
        if has_test or val_folder:
            test = whole(self._sources["test"])
        else:
            reported = wanted if self._test_share is None else round(self._test_share * len(rows))
            if not reported:
                raise UserError(
                    f"data.val_size=0: {self._root} has neither val nor test, and nothing would be left to report on",
                    hint=f"data.val_size={max(1, len(rows) // 10)}, or data.test_share=0.2",
                )
            rows, chosen = self._split(rows, labels, reported, "test")
            test = part(train, labels, chosen)
        if wanted:
            rows, chosen = self._split(rows, labels, wanted, "validation")
        else:
            chosen = self._split(rows, labels, min(_MOST, max(1, len(rows) // 10)), "validation")[1]
        return Parts(part(train, labels, self._fraction(rows)), part(train, labels, chosen), test)

    def _part(self, name: str) -> tuple[Listing, Indices]:
        """A folder's images and the class of each among those kept, -1 where it is none of them."""
        new = {self._layout.names[old]: number for number, old in enumerate(self._kept)}
        listed = self._layout.listing(name)
        return listed, np.asarray([new.get(name, -1) for name in listed.names], dtype=np.int64)[listed.labels]

    def _split(self, rows: Indices, labels: Indices, count: int, purpose: str) -> tuple[Indices, Indices]:
        """Rows that stay and `count` that are held out, each class in proportion; the same in every run."""
        if count >= len(rows):
            raise UserError(
                f"data.val_size={count} leaves nothing to train on: {self._root / 'train'} has {len(labels)} images",
                hint=f"data.val_size={len(labels) // 10}",
            )
        marked = stratified(labels[rows], count, f"image_folder/{purpose}")
        return rows[~marked], rows[marked]

    def _fraction(self, rows: Indices) -> Indices:
        keep = max(1, round(self._train_fraction * len(rows)))
        return np.sort(rows[fixed_order(len(rows), "image_folder/fraction")[:keep]])

    @override
    def _plain_batches(self, order: EpochOrder) -> Dataset[Batch]:
        if self._repeats > 1:
            order = RepeatedOrder(order.n_rows, order.seed, self._repeats)
        return super()._plain_batches(order)

    @override
    def _fingerprint(self) -> str:
        return hash_text(repr([self.parts.train.identity(), self._seed, self._repeats]))

    @property
    @override
    def _eval_batch_size(self) -> int:
        return self.batch_size  # several batches wait at every worker

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        return super().describe() | {
            "parts": self._sources,
            **({"kept_classes": list(self.class_names)} if self._wanted_classes is not None else {}),
            "eval_size": self._eval_size,
            "crop_ratio": self._crop_ratio,
            "interpolation": self._interpolation,
            "augment": self._augment,
            "magnitude": self._magnitude if self._augment == "rand_augment" else None,
            "erasing": self._erasing,
            "repeated_augment": self._repeats,
        }
