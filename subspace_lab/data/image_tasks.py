"""Image sets as tasks of a suite: parts of MNIST, GTSRB, CIFAR-10 and others at one size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.data.image_sources import KINDS, load
from subspace_lab.data.presentation import Presentation
from subspace_lab.data.splits import Indices, fixed_order, stratified
from subspace_lab.data.supervised import Parts, default_data_dir
from subspace_lab.data.task_suite import HeldExamples, SuiteTask, TaskSuite
from subspace_lab.errors import UserError, did_you_mean

_CHUNK = 4096  # images converted at a time
_LARGEST_SHARE = 4  # of a small training set at most a quarter is for pretraining


class ImageTasks(TaskSuite):
    """Image sets in memory, grey or in colour, brought to one size; what is taken of each is the same in every run.

    The encoder is pretrained to tell all classes of all sets apart, on images that no expert sees.

    Args:
        sets: their names, a task each; those of the data group that `image_sources` knows.
        batch_size: images per step.
        side: of the images in pixels.
        colour: keep colours (grey images have three equal channels then); else colour becomes grey.
        pretrain: training images of each set that the encoder is pretrained on, a quarter of a small set at most.
        train: training images of each set for its expert, at most.
        validation: training images of each set by which λ is chosen.
        test: test images of each set, at most; classes in proportion.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where decoded images are kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.

    Raises:
        UserError: no such set, one given twice, a number below 1.
    """

    def __init__(
        self,
        sets: Sequence[str],
        batch_size: int = 64,
        side: int = 28,
        colour: bool = False,
        pretrain: int = 1000,
        train: int = 3000,
        validation: int = 300,
        test: int = 1000,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        dataset: str = "image_tasks",
    ) -> None:
        super().__init__(dataset, batch_size)
        for name in sets:
            if name not in KINDS:
                raise UserError(
                    f"data.sets: no image set {name!r}", hint=did_you_mean(name, KINDS) or f"one of {', '.join(KINDS)}"
                )
        if not sets or len(set(sets)) < len(sets):
            raise UserError(f"data.sets={list(sets)}: expected at least one set, and each once")
        numbers = {"side": side, "pretrain": pretrain, "train": train, "validation": validation, "test": test}
        for name, value in numbers.items():
            if value < 1:
                raise UserError(f"data.{name}={value}: expected at least 1")
        self._sets, self._numbers = list(sets), numbers
        self.shape = (3 if colour else 1, side, side)
        self._presentation = Presentation(self.shape, (0.3,) * self.shape[0], (0.35,) * self.shape[0])
        self._data_dir = default_data_dir(data_dir)
        cache = cache_dir or os.environ.get("SUBSPACE_CACHE") or "~/.cache/subspace-lab"
        self._cache_dir = Path(cache).expanduser()

    @property
    @override
    def names(self) -> list[str]:
        return list(self._sets)

    @override
    def _make(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        tasks, before, start = [], [], 0
        for name in self._sets:
            parts, own = self._read(name)
            classes = KINDS[name].classes
            tasks.append(SuiteTask(name, classes, parts))
            before.append(HeldExamples(own.inputs, own.labels + start))
            start += classes
        joined = HeldExamples.joined(before)
        # How well pretraining went is seen on the tasks; its own validation only draws a curve.
        return SuiteTask("pretraining", start, Parts(joined, joined, joined)), tasks

    def _read(self, name: str) -> tuple[Parts, HeldExamples]:
        found, kind = load(name, self._data_dir, self._cache_dir), KINDS[name]
        n = self._numbers
        labels = found.train_labels.numpy()
        held_out = stratified(labels, min(n["validation"], len(labels) // 8), f"image_tasks/{name}/validation")
        rest = np.flatnonzero(~held_out)
        count = min(n["pretrain"], len(rest) // _LARGEST_SHARE)
        first = stratified(labels[rest], count, f"image_tasks/{name}/pretrain")
        left = rest[~first]
        chosen = np.sort(left[fixed_order(len(left), f"image_tasks/{name}/train")[: n["train"]]])
        tested = stratified(
            found.test_labels.numpy(), min(n["test"], len(found.test_labels)), f"image_tasks/{name}/test"
        )

        def held(images: Tensor, targets: Tensor, rows: Indices) -> HeldExamples:
            chunks = torch.split(torch.from_numpy(rows), _CHUNK)
            inputs = [self._presentation.convert(images[chunk].float() / kind.white) for chunk in chunks]
            return HeldExamples(torch.cat(inputs), targets[torch.from_numpy(rows)])

        train = (found.train_images, found.train_labels)
        parts = Parts(
            held(*train, chosen),
            held(*train, np.flatnonzero(held_out)),
            held(found.test_images, found.test_labels, np.flatnonzero(tested)),
        )
        return parts, held(*train, rest[first])
