"""Mixed batches: their labels, what they are mixed of, and that a place in the sequence decides it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.data.images import ImageDataModule
from subspace_lab.data.mixing import borrowed_generators, seed_generators
from subspace_lab.data.packing import Batch


def take(count: int, rank: int = 0, world_size: int = 1, seed: int = 0, start: int = 0, **options: Any) -> list[Batch]:
    module = ImageDataModule(**({"batch_size": 16} | options))
    module.configure(rank, world_size, seed)
    module.setup("fit")
    for _ in range(start):
        module.batch_consumed()
    return list(itertools.islice(module.train_dataloader(), count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_labels_are_shares_of_what_the_images_are_made_of() -> None:
    plain, mixed = take(40), take(40, mixup=0.8)
    shares = []
    for before, after in zip(plain, mixed, strict=True):
        assert after["labels"].dtype == torch.float32 and after["labels"].shape == (16, 10)
        assert torch.allclose(after["labels"].sum(1), torch.ones(16), atol=1e-6)
        one_hot = torch.nn.functional.one_hot(before["labels"], 10).float()
        delta, moved = one_hot - one_hot.flip(0), after["labels"] - one_hot.flip(0)
        share = float((delta * moved).sum() / (delta * delta).sum())
        assert torch.allclose(after["labels"], share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-5)
        expected = share * before["inputs"] + (1 - share) * before["inputs"].flip(0)
        assert torch.allclose(after["inputs"], expected, atol=1e-5)
        shares.append(share)
    assert len({round(share, 4) for share in shares}) == 40 and 0.3 < np.mean(shares) < 0.7


def test_cutmix_pastes_a_rectangle_of_the_labels_share() -> None:
    for before, after in zip(take(30), take(30, cutmix=1.0), strict=True):
        other = before["inputs"].flip(0)
        pasted = ((after["inputs"] != before["inputs"]) & (before["inputs"] != other)).any(0)[0]
        if pasted.any():
            rows, columns = (torch.nonzero(pasted.any(axis)).flatten() for axis in (1, 0))
            area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            assert torch.equal(after["inputs"][:, :, *box], other[:, :, *box])
            one_hot = torch.nn.functional.one_hot(before["labels"], 10).float()
            lower = one_hot * (1 - area / 64) + one_hot.flip(0) * area / 64
            # Border pixels are black in all digits, so the rectangle may be larger than what is seen of it.
            assert float((after["labels"] - lower).abs().max()) <= (64 - int(area)) / 64 + 1e-6
        assert torch.allclose(after["labels"].sum(1), torch.ones(16), atol=1e-6)


def test_both_take_turns() -> None:
    plain, both = take(60), take(60, mixup=0.8, cutmix=1.0)
    cut = 0
    for before, after in zip(plain, both, strict=True):
        stays = (after["inputs"] == before["inputs"]) | (after["inputs"] == before["inputs"].flip(0))
        cut += bool(stays.all())
    assert 15 <= cut <= 45


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_mixing_follows_seed_and_place(augment: str) -> None:
    options: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0, "augment": augment}
    whole = take(8, **options)
    assert same(take(8, **options), whole) and same(take(4, start=4, **options), whole[4:])
    assert not same(take(8, seed=1, **options), whole)
    halves = [take(4, rank, 2, **options) for rank in range(2)]
    assert same([halves[k % 2][k // 2] for k in range(8)], whole)


def test_generators_are_lent_and_given_back() -> None:
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    drawn = []
    for place in (1, 2, 1):
        with pytest.raises(KeyError), borrowed_generators():
            seed_generators("test", 0, place)
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            raise KeyError
    assert drawn[0] == drawn[2] and not set(drawn[0]) & set(drawn[1])
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
    assert np.array_equal(np.random.get_state()[1], before[1][1])  # type: ignore[index]


def test_a_blank_batch_has_the_shape_of_a_training_batch() -> None:
    for options in ({}, {"mixup": 0.2}):
        blank = ImageDataModule(batch_size=16, **options).blank_batch()[0]  # type: ignore[arg-type]
        real = take(1, **options)[0]
        assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
