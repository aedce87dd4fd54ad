"""Tasks made of one data set: who has which examples under which labels, in which order, and that they resume."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.continual.class_order import class_order
from subspace_lab.continual.scenario import Scenario, TaskData
from subspace_lab.continual.sequences import DomainSequence, Permuted, Rotated, Split
from subspace_lab.data.changes import PixelOrder, Rotation
from subspace_lab.data.images import ImageDataModule
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError

PARTS = ("train", "validation", "test")


def digits(seed: int = 0, **options: Any) -> ImageDataModule:
    module = ImageDataModule(**{"batch_size": 10, **options})
    module.configure(0, 1, seed)
    module.setup()
    return module


def build(scenario: Scenario, seed: int = 0, **options: Any) -> list[TaskData]:
    return scenario.build(digits(seed, **options), seed)


def everything(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = part.batch(np.arange(len(part)))
    return batch["inputs"], batch["labels"]


def take(module: Any, count: int) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        module.batch_consumed()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


@pytest.mark.parametrize("order", ["fixed", "shuffled", "pilot"])
@pytest.mark.parametrize("head", ["task", "class", "single"])
def test_a_split_has_every_example_once_under_its_column(order: Any, head: Any) -> None:
    data = digits()
    scenario = Split(sizes=[4, 3, 3], class_order=order, head=head)
    tasks = scenario.build(data, 0)
    classes = scenario.describe()["class_order"]
    assert sorted(classes) == list(range(10)) and (classes == list(range(10))) == (order == "fixed")
    assert scenario.sizes(data) == ([4] if head == "single" else [4, 3, 3])
    assert scenario.outputs(data) == (4 if head == "single" else 10)
    starts = (0, 0, 0) if head == "single" else (0, 4, 7)
    stops = (4, 4, 4) if head == "single" else (4, 7, 10)
    assert [task.columns for task in tasks] == [range(a, b) for a, b in zip(starts, stops, strict=True)]
    for part in PARTS:
        images, labels = everything(getattr(data.parts, part))
        seen = 0
        for task, first, start, size in zip(tasks, (0, 4, 7), starts, (4, 3, 3), strict=True):
            own_images, columns = everything(getattr(task.data.parts, part))
            whose = torch.tensor(classes)[first + columns - start]
            mine = torch.isin(labels, torch.tensor(classes[first : first + size]))
            assert torch.equal(own_images, images[mine]) and torch.equal(whose, labels[mine])
            seen += len(columns)
        assert seen == len(labels)
    assert len({task.name for task in tasks}) == 3


def test_class_orders_are_what_they_are_called() -> None:
    pilot = class_order("pilot", 100, 7)
    np.random.seed(1993)
    assert np.array_equal(pilot, np.random.permutation(100))
    assert pilot[:10].tolist() == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]  # CIFAR-100's first ten in iCaRL's lists
    assert np.array_equal(class_order("pilot", 10, 0), class_order("pilot", 10, 1))
    assert not np.array_equal(class_order("shuffled", 10, 0), class_order("shuffled", 10, 1))
    assert np.array_equal(class_order("shuffled", 10, 3), class_order("shuffled", 10, 3))
    orders = []
    for own, run in ((None, 0), (None, 1), (5, 0), (5, 1)):
        scenario = Split(class_order="shuffled", seed=own)
        build(scenario, run)
        orders.append(scenario.describe()["class_order"])
    assert orders[0] != orders[1] and orders[2] == orders[3]


@pytest.mark.parametrize("first", ["identity", "permuted"])
def test_permutations_differ_by_task_and_not_by_part(first: Any) -> None:
    data, scenario = digits(), Permuted(tasks=4, first=first)
    tasks = scenario.build(data, 0)
    found = []
    for index, task in enumerate(tasks):
        orders = []
        for part in PARTS:
            images, labels = everything(getattr(data.parts, part))
            changed, columns = everything(getattr(task.data.parts, part))
            assert torch.equal(labels, columns)
            order = PixelOrder(8, 8, f"permuted/0/{index}").order
            if index or first == "permuted":
                assert torch.equal(changed.flatten(1), images.flatten(1)[:, order])
            else:
                assert torch.equal(changed, images)
            orders.append(order.tolist())
        assert sorted(orders[0]) == list(range(64))
        found.append(orders[0])
    assert len({tuple(order) for order in found}) == 4
    told = scenario.describe()
    assert told["tasks"] == [f"permutation {index}" for index in range(4)]
    assert len(set(told["changes"])) == 4 and (told["changes"][0] == "none") == (first == "identity")
    other = Permuted(tasks=4, first=first)
    build(other, 1)
    assert not set(other.describe()["changes"]) - {"none"} & set(told["changes"])
    training = take(tasks[1].data, 1)[0]["inputs"].flatten(1)
    plain = everything(data.parts.train)[0].flatten(1)[:, PixelOrder(8, 8, "permuted/0/1").order]
    assert all(bool((plain == image).all(1).any()) for image in training)


def test_own_heads_for_changed_images() -> None:
    data, scenario = digits(), Permuted(tasks=3, head="task")
    tasks = scenario.build(data, 0)
    assert [task.columns for task in tasks] == [range(0, 10), range(10, 20), range(20, 30)]
    assert scenario.sizes(data) == [10, 10, 10] and scenario.outputs(data) == 30
    labels = everything(data.parts.test)[1]
    assert torch.equal(everything(tasks[2].data.parts.test)[1], labels + 20)


def test_rotations() -> None:
    images = torch.rand(2, 3, 6, 6)
    black = torch.full((3, 1, 1), -0.7)
    assert torch.allclose(Rotation(6, 6, 90)(images, black), torch.rot90(images, 1, (2, 3)), atol=1e-5)
    assert torch.allclose(Rotation(6, 6, -90)(images, black), torch.rot90(images, 3, (2, 3)), atol=1e-5)
    assert torch.allclose(Rotation(6, 6, 180)(images, black), images.flip(2, 3), atol=1e-5)
    empty = black.expand(2, 3, 6, 8).contiguous()
    assert torch.allclose(Rotation(6, 8, 37)(empty, black), empty, atol=1e-6)  # black stays black, from outside too
    # A point right of the centre goes up when turned counterclockwise, also where images are not square.
    point = torch.zeros(1, 1, 9, 15)
    point[0, 0, 4, 10] = 1
    turned = Rotation(9, 15, 90)(point, torch.zeros(1, 1, 1))
    assert float(turned[0, 0, 1, 7]) == pytest.approx(1, abs=1e-5) and float(turned.sum()) == pytest.approx(1, abs=1e-5)
    tilted = Rotation(9, 15, 45)(point, torch.zeros(1, 1, 1))
    y, x = divmod(int(tilted.flatten().argmax()), 15)
    assert math.hypot(y - (4 - 3 / math.sqrt(2)), x - (7 + 3 / math.sqrt(2))) < 0.8
    tasks = build(Rotated(tasks=4))
    assert [task.name for task in tasks] == ["0°", "45°", "90°", "135°"]
    plain, quarter = (everything(tasks[index].data.parts.test)[0] for index in (0, 2))
    assert torch.allclose(quarter, torch.rot90(plain, 1, (2, 3)), atol=1e-5)
    scenario = Rotated(angles=[10, 350])
    assert len(build(scenario)) == 2 and scenario.describe()["changes"] == ["rotation 10°", "rotation 350°"]


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop"])
@pytest.mark.parametrize("scenario", [Split(), Permuted(tasks=3)], ids=["split", "permuted"])
def test_tasks_resume_exactly_and_are_shuffled_on_their_own(scenario: Scenario, augment: str) -> None:
    def task(rank: int = 0, world: int = 1, **options: Any) -> Any:
        found = build(scenario, augment=augment, **options)[1].data
        found.configure(rank, world, 0)
        return found

    whole = take(task(), 30)
    cut = task()
    take(cut, 17)
    next(iter(cut.train_dataloader()))  # fetched ahead, never used
    resumed = task()
    resumed.load_state_dict(cut.state_dict())
    assert same(take(resumed, 13), whole[17:])
    halves = [take(task(rank, 2, batch_size=5), 30) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch["inputs"], torch.cat([part["inputs"] for part in parts]))
    other_seed = task()
    other_seed.configure(0, 1, 1)
    assert not same(take(other_seed, 1), whole[:1])


def test_positions_orders_and_fingerprints_are_each_tasks_own() -> None:
    data = digits()
    tasks = Permuted(tasks=3).build(data, 0)
    first, second = (task.data.train_dataloader() for task in tasks[:2])
    labels = [[batch["labels"].tolist() for batch in itertools.islice(loader, 5)] for loader in (first, second)]
    assert labels[0] != labels[1]
    tasks[0].data.batch_consumed()
    states = [module.state_dict() for module in (data, *(task.data for task in tasks))]
    assert [state["batches"] for state in states] == [0, 1, 0, 0]
    assert len({state["fingerprint"] for state in states}) == 4
    assert tasks[1].data.describe()["task"] == "permutation 1" and "task" not in data.describe()


def test_all_tasks_together() -> None:
    for scenario, options in ((Split(class_order="pilot"), {}), (Permuted(tasks=3), {"augment": "crop_flip"})):
        tasks = build(scenario, **options)
        whole = scenario.joined(tasks)
        for part in PARTS:
            images, labels = everything(getattr(whole.parts, part))
            parts = [everything(getattr(task.data.parts, part)) for task in tasks]
            assert torch.equal(images, torch.cat([own[0] for own in parts]))
            assert torch.equal(labels, torch.cat([own[1] for own in parts]))
        assert whole.train_rows == sum(task.data.train_rows for task in tasks)
        batches = take(whole, 12)
        assert len({int(label) for batch in batches for label in batch["labels"]}) == 10
        mixed = np.arange(0, len(whole.parts.test), 7)[::-1].copy()
        assert torch.equal(whole.parts.test.batch(mixed)["labels"], everything(whole.parts.test)[1][mixed.tolist()])
        again = scenario.joined(tasks)
        again.load_state_dict(whole.state_dict())
        more = take(whole, 5)
        assert same(take(again, 5), more) and not same(more, batches[:5])


def test_an_epoch_of_the_whole_has_every_example_once() -> None:
    scenario = Split()
    whole = scenario.joined(build(scenario, val_size=137))  # 1437 - 137 = 10 · 130
    images = torch.cat([batch["inputs"] for batch in take(whole, 130)])
    assert len(torch.unique(images.flatten(1), dim=0)) == 1300


def test_drawn_examples_are_plain_and_reproducible() -> None:
    task = build(Permuted(tasks=2), augment="crop_flip")[1].data
    images, labels = everything(task.parts.train)
    drawn = list(task.draw(25, 10, 3, "bases"))
    assert [len(batch["labels"]) for batch in drawn] == [10, 10, 5]
    found = torch.cat([batch["inputs"] for batch in drawn]).flatten(1)
    assert len(torch.unique(found, dim=0)) == 25
    assert all(bool((images.flatten(1) == image).all(1).any()) for image in found)
    assert same(list(task.draw(25, 10, 3, "bases")), drawn)
    for seed, purpose in ((4, "bases"), (3, "memory")):
        assert not same(list(task.draw(25, 10, seed, purpose)), drawn)
    whole = list(task.draw(None, 100, 3, "bases"))
    assert torch.equal(torch.cat([batch["inputs"] for batch in whole]), images)
    assert torch.equal(torch.cat([batch["labels"] for batch in whole]), labels)
    assert sum(len(batch["labels"]) for batch in task.draw(10_000, 100, 3, "bases")) == len(labels)
    assert task.state_dict()["batches"] == 0


def test_mixed_labels_are_shares_of_the_columns() -> None:
    task = build(Split(), mixup=0.2)[1]
    labels = take(task.data, 1)[0]["labels"]
    assert labels.shape == (10, 10) and torch.allclose(labels.sum(1), torch.ones(10))
    assert float(labels[:, 2:4].sum()) == pytest.approx(10, abs=1e-4) and task.columns == range(2, 4)


def test_without_held_out_examples_each_task_is_watched_on_its_own() -> None:
    for task in build(Split(), val_size=0):
        images, labels = everything(task.data.parts.validation)
        assert set(labels.tolist()) <= set(task.columns) and len(labels) == len(task.data.parts.train) // 10
        assert torch.equal(images, everything(task.data.parts.train)[0][-len(labels) :])
        assert task.data.describe()["held_out"] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(Split(tasks=4)), r"scenario\.tasks=4: digits cannot be divided so.*\(scenario\.tasks=5, or "),
        (lambda: build(Split(tasks=20)), r"scenario\.tasks=20: digits has only 10 classes \(scenario\.tasks=10"),
        (lambda: build(Split(tasks=10)), r"a task of one class of digits.*scenario\.head=class"),
        (lambda: build(Split(sizes=[5, 4])), r"scenario\.sizes=\[5, 4\] sum to 9: digits has 10 classes"),
        (lambda: build(Split(sizes=[10, 0])), r"scenario\.sizes=\[10, 0\]"),
        (lambda: build(Split(class_order="random")), r"scenario\.class_order=random: .*fixed, shuffled or pilot"),  # type: ignore[arg-type]
        (lambda: Permuted(head="class"), r"scenario\.head=class does not fit scenario=permuted.*single or task"),
        (lambda: Permuted(tasks=0), r"scenario\.tasks=0: expected at least 1"),
        (lambda: Rotated(angles=[5, 5]), r"scenario\.angles=\[5, 5\]: expected each angle once"),
        (lambda: Split(seed=-1), r"scenario\.seed=-1"),
        (lambda: build(DomainSequence()), r"scenario=domain needs data of several sets.*five_datasets"),
        (lambda: build(Split(), batch_size=300), r"data\.batch_size=300: task 0,1 .*has only \d+ training examples"),
        (lambda: build(Split(), val_size=3), r"task 0,1 of data=digits has no validation examples"),
    ],
)
def test_what_does_not_fit_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        make()
    assert "\n" not in str(told.value)


def test_one_class_a_task_with_a_growing_head() -> None:
    tasks = build(Split(tasks=10, head="class", loss_over="seen"), val_size=150)
    assert [task.columns for task in tasks] == [range(index, index + 1) for index in range(10)]
