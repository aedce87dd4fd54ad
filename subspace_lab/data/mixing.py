"""Mixup and CutMix of training batches, and random numbers that belong to a place in the training sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset

from subspace_lab.data.packing import Batch
from subspace_lab.linalg.random import derive_key


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Leave Python's, numpy's and torch's CPU generators as they were, whatever is drawn meanwhile."""
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.random.set_rng_state(tensors)


def seed_generators(purpose: str, seed: int, place: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators for one place of the training sequence."""
    key = derive_key(purpose, seed, place)
    random.seed(key)
    np.random.seed(key % 2**32)
    # Not torch.manual_seed, which would seed the accelerators' generators too: those are the model's.
    torch.default_generator.manual_seed(key)


class MixedBatches(Dataset[Batch]):
    """Training batches, each mixed with itself in reverse: Mixup, CutMix, or at every batch one of the two at random.

    What is drawn for a batch is a function of the seed and of the batch's number, counted over all processes: two
    processes mix as one process that accumulates twice as many batches does. Images are mixed with images of the same
    process's batch.

    Args:
        batches: of `inputs` float32 (b, channels, height, width) and `labels` int64 (b,), b even.
        classes: how many.
        mixup: α of Mixup's Beta(α, α); 0 is without (Zhang et al. 2018, arXiv 1710.09412).
        cutmix: α of CutMix's; 0 is without (Yun et al. 2019, arXiv 1905.04899).
        seed: of the run.
        rank: this process.
        world_size: processes.

    Items are `inputs` as before and `labels` float32 (b, classes), every row of sum 1.
    """

    def __init__(
        self,
        batches: Dataset[Batch],
        classes: int,
        mixup: float,
        cutmix: float,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        from timm.data.mixup import Mixup

        self._batches, self._seed, self._rank, self._world_size = batches, seed, rank, world_size
        self._mix = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=classes
        )

    def __getitem__(self, index: int) -> Batch:
        batch = self._batches[index]
        with borrowed_generators():
            seed_generators("mix/1", self._seed, index * self._world_size + self._rank)
            images, labels = self._mix(batch["inputs"], batch["labels"])
        return {"inputs": images, "labels": labels}
