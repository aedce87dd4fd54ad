"""Suites of tasks: the same images for all tasks and in every run, none of them in two parts."""

from __future__ import annotations

import pytest
import torch

from subspace_lab.data.digits_tasks import VIEWS, DigitsTasks
from subspace_lab.data.image_tasks import ImageTasks
from subspace_lab.data.task_suite import unique
from subspace_lab.errors import UserError

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in inputs}


def test_digits_are_divided_once_and_all_views_show_the_same_ones() -> None:
    pretraining, tasks = DigitsTasks().made
    assert pretraining is not None and len(tasks) == 8
    for task in tasks:
        sizes = [len(part) for part in (task.parts.train, task.parts.validation, task.parts.test)]
        assert sizes == [650, 180, 717] and task.classes == 10
        for mine, first in zip(vars(task.parts).values(), vars(tasks[0].parts).values(), strict=True):
            assert torch.equal(mine.labels, first.labels)
    turned = tasks[0].parts
    parts = [rows(part.inputs) for part in (turned.train, turned.validation, turned.test)]
    parts.append(rows(pretraining.parts.train.inputs))
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not one & other
    assert len(pretraining.parts.train) == 250 * 16
    again = DigitsTasks().made[1]
    assert [t.parts.train.identity() for t in tasks] == [t.parts.train.identity() for t in again]


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "invert"])
def test_views_move_pixels_and_change_none(view: str) -> None:
    seen = VIEWS[view](IMAGES)
    assert seen.shape == IMAGES.shape
    assert torch.equal(seen.flatten(1).sort(1).values, IMAGES.flatten(1).sort(1).values)
    assert torch.equal(seen, IMAGES) == (view == "upright")


def test_noise_has_its_length_comes_anew_for_each_draw_and_is_the_same_twice() -> None:
    suite, twin = (DigitsTasks(["upright", "noise"], noise=0.5, noise_draws=3) for _ in range(2))
    clean, noisy = (task.parts.train for task in suite.made[1])
    assert len(noisy) == 3 * len(clean)
    added = noisy.inputs.view(3, *clean.inputs.shape) - clean.inputs
    assert (added.std() * 0.376).item() == pytest.approx(0.5, rel=0.02) and abs(added.mean().item()) < 0.01
    assert not torch.equal(added[0], added[1])
    assert noisy.identity() == twin.made[1][1].parts.train.identity()


def test_image_sets_come_at_one_size_with_labels_of_their_own_before() -> None:
    suite = ImageTasks(["digits"], side=12, pretrain=100, train=400, validation=50, test=80)
    pretraining, (task,) = suite.made
    assert pretraining is not None and pretraining.classes == 10
    assert task.parts.train.inputs.shape == (400, 1, 12, 12) and len(task.parts.test) == 80
    seen = [rows(part.inputs) for part in (pretraining.parts.train, task.parts.train, task.parts.validation)]
    assert [len(one) for one in seen] == [100, 400, 50] and len(set.union(*seen)) == 550
    assert suite.tasks()[0].model_arguments() == {"data_shape": (1, 12, 12), "data_classes": 10}


def test_batches_of_an_expert_cover_its_images() -> None:
    data = DigitsTasks(["rot90"], train=64, batch_size=32).tasks()[0]
    data.configure(0, 1, 0)
    data.setup()
    batches = iter(data.train_dataloader())
    assert len(rows(torch.cat([next(batches)["inputs"] for _ in range(2)]))) == 64


def test_names_and_wrong_words() -> None:
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a 2", "a 3"]
    with pytest.raises(UserError, match="no view 'rot9'"):
        DigitsTasks(["rot9"])
    with pytest.raises(UserError, match="1797 images in all"):
        _ = DigitsTasks(train=1700).made
    with pytest.raises(UserError, match="each once"):
        ImageTasks(["digits", "digits"])
