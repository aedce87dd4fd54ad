"""Tasks made of folders and of several sets; SVHN from its files; images brought to another size."""

from __future__ import annotations

import functools
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from subspace_lab.continual.scenario import Scenario, TaskData
from subspace_lab.continual.sequences import DomainSequence, Permuted, Rotated, Split
from subspace_lab.data import image_sources
from subspace_lab.data.image_examples import random_resized_crop
from subspace_lab.data.image_folder import ImageFolderDataModule
from subspace_lab.data.images import ImageDataModule
from subspace_lab.data.sequence import DataSequence, FolderSequence
from subspace_lab.errors import UserError

PARTS = ("train", "validation", "test")


def plant(root: Path, classes: dict[str, int], count: int, blue: int = 0) -> None:
    """Images of one colour a class (its red value), `blue` for the folder."""
    for name, red in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.zeros((10, 12, 3), np.uint8)
            pixels[:, :6] = (red, index, blue)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    plant(tmp_path / "set/train", {f"c{k}": 40 * k + 20 for k in range(6)}, 8)
    plant(tmp_path / "set/test", {f"c{k}": 40 * k + 20 for k in range(6)}, 3)
    plain = {"batch_size": 4, "val_size": 6, "num_workers": 0, "image_size": 8, "crop_ratio": 1.0}
    where = {"root": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    return functools.partial(ImageFolderDataModule, **plain, **where, mean=[0.5] * 3, std=[0.5] * 3)


def build(scenario: Scenario, data: Any) -> list[TaskData]:
    data.configure(0, 1, 0)
    data.prepare_data()
    data.setup()
    return scenario.build(data, 0)


def everything(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = part.batch(np.arange(len(part)))
    return batch["inputs"], batch["labels"]


def red(images: torch.Tensor) -> torch.Tensor:
    return ((images[:, 0, 4, 1] * 0.5 + 0.5) * 255).round()


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop"])
def test_folders_are_split_by_class(folder: Any, augment: str) -> None:
    scenario = Split(tasks=3, class_order="shuffled")
    tasks = build(scenario, folder(augment=augment))
    order = scenario.describe()["class_order"]
    for index, task in enumerate(tasks):
        for part, size in zip(PARTS, (14, 2, 6), strict=True):
            images, labels = everything(getattr(task.data.parts, part))
            assert labels.tolist() == sorted(labels.tolist(), key=lambda column: order[column]) and len(labels) == size
            assert torch.equal(red(images), torch.tensor([40.0 * order[column] + 20 for column in labels]))
            assert set(labels.tolist()) == {2 * index, 2 * index + 1}
    module = tasks[1].data
    loader = module.train_dataloader()
    batches = list(itertools.islice(loader, 6))
    workers = build(scenario, folder(augment=augment, num_workers=1))[1].data
    for batch, other in zip(batches, itertools.islice(workers.train_dataloader(), 6), strict=True):
        assert torch.equal(batch["inputs"], other["inputs"]) and torch.equal(batch["labels"], other["labels"])
        assert set(batch["labels"].tolist()) <= {2, 3}
    joint = scenario.joined(tasks)
    assert joint.train_rows == 42
    assert len(set(torch.cat([b["labels"] for b in itertools.islice(joint.train_dataloader(), 11)]).tolist())) == 6
    drawn = torch.cat([batch["inputs"] for batch in module.draw(None, 5, 0, "bases")])
    assert torch.equal(drawn, everything(module.parts.train)[0])


def test_folder_images_are_changed_like_any(folder: Any) -> None:
    data = folder()
    plain = everything(build(Permuted(tasks=1), data)[0].data.parts.test)[0]
    changed = everything(Permuted(tasks=2).build(data, 0)[1].data.parts.test)[0]
    assert torch.equal(plain.flatten(2).sort(2).values, changed.flatten(2).sort(2).values)
    assert not torch.equal(plain, changed)
    turned = everything(Rotated(angles=[90, 45]).build(data, 0)[1].data.parts.test)[0]
    assert torch.allclose(turned[:, :, 0, 0], torch.tensor(-1.0))  # what comes from outside is black


def test_layouts_of_folders(folder: Any, tmp_path: Path) -> None:
    plant(tmp_path / "flat", {"a": 10, "b": 200}, 10)
    data = folder(root=str(tmp_path / "flat"), val_size=2, test_share=0.2)
    build(Split(tasks=1), data)
    assert [len(getattr(data.parts, part)) for part in PARTS] == [14, 2, 4] and data.class_names == ("a", "b")
    plant(tmp_path / "dom/paint", {"dog": 10, "axe": 200}, 6)
    for part, rows in (("train", range(4)), ("test", range(4, 6))):
        lines = [f"paint/{name}/{row:02}.png {label}" for row in rows for label, name in ((1, "axe"), (0, "dog"))]
        (tmp_path / f"dom/paint_{part}.txt").write_text("\n".join(lines) + "\n")
    listed = folder(root=str(tmp_path / "dom/paint"), val_size=2)
    build(Split(tasks=1), listed)
    assert [len(getattr(listed.parts, part)) for part in PARTS] == [6, 2, 4]
    assert listed.class_names == ("dog", "axe")
    images, labels = everything(listed.parts.test)
    assert torch.equal(red(images), torch.where(labels == 0, 10.0, 200.0)) and labels.tolist() == [1, 0, 1, 0]
    (tmp_path / "dom/paint_train.txt").write_text("paint/dog/00.png\n")
    with pytest.raises(UserError, match=r"paint_train\.txt, line 1: expected 'path label'"):
        _ = folder(root=str(tmp_path / "dom/paint"), val_size=2).classes
    (tmp_path / "dom/paint_train.txt").write_text("paint/dog/00.png 0\npaint/dog/01.png 3\n")
    with pytest.raises(UserError, match=r"no image has label 2"):
        _ = folder(root=str(tmp_path / "dom/paint"), val_size=2).classes


def test_domains_share_their_classes_or_not(folder: Any, tmp_path: Path) -> None:
    for name, blue, classes in (
        ("photo", 50, {"a": 20, "b": 120}),
        ("sketch", 150, {"a": 20, "b": 120}),
        ("text", 250, {"c": 60, "d": 160, "e": 220}),
    ):
        plant(tmp_path / f"root/{name}/train", classes, 6, blue)
        plant(tmp_path / f"root/{name}/test", classes, 2, blue)
    each = functools.partial(folder, val_size=2, augment="none")
    make = functools.partial(FolderSequence, each, "doms", 4, root=str(tmp_path / "root"))
    data, scenario = make(folders=["sketch", "photo"]), DomainSequence()
    assert scenario.sizes(data) == [2] and scenario.outputs(data) == 2  # before any image is read
    tasks = build(scenario, data)
    assert [task.name for task in tasks] == ["sketch", "photo"] == list(scenario.describe()["tasks"])
    for task, blue in zip(tasks, (150, 50), strict=True):
        assert task.columns == range(2) and task.data.train_rows == 10
        images, labels = everything(task.data.parts.train)
        assert torch.equal(((images[:, 2, 4, 1] * 0.5 + 0.5) * 255).round(), torch.full((10,), float(blue)))
        assert torch.equal(red(images), torch.where(labels == 0, 20.0, 120.0))
    assert scenario.joined(tasks).train_rows == 20 and data.classes == 2 and data.train_rows == 20
    halves = Split(tasks=2, head="class", loss_over="seen").build(data, 0)
    blues = everything(halves[1].data.parts.train)[0][:, 2, 4, 1].unique()
    assert len(blues) == 2 and set(everything(halves[1].data.parts.train)[1].tolist()) == {1}
    whole = make(folders=None)
    assert list(whole.members) == ["photo", "sketch", "text"] and not whole.shared_classes and whole.classes == 7
    with pytest.raises(UserError, match=r"head=single: the sets of data=doms have different classes"):
        DomainSequence().sizes(whole)
    own = build(DomainSequence(head="task"), whole)
    assert [task.columns for task in own] == [range(0, 2), range(2, 4), range(4, 7)]
    assert set(everything(own[2].data.parts.test)[1].tolist()) == {4, 5, 6}
    images, labels = everything(whole.parts.test)
    expected = torch.tensor([20.0, 120, 20, 120, 60, 160, 220])
    assert torch.equal(red(images), expected[labels])
    assert DomainSequence(tasks=2, head="task").sizes(whole) == [2, 2]
    with pytest.raises(UserError, match=r"scenario\.tasks=4: data=doms has 3 sets"):
        DomainSequence(tasks=4, head="task").sizes(whole)
    with pytest.raises(UserError, match=r"shared_classes=true, but doms has different numbers.*text 3"):
        _ = make(shared_classes=True).classes
    with pytest.raises(UserError, match=r"expected each of them once"):
        make(folders=["photo", "photo"])
    with pytest.raises(UserError, match=r"0 folders in .*nowhere"):
        FolderSequence(each, "nowhere", data_dir=str(tmp_path))


def write_idx(raw: Path, part: str, count: int) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    images = np.full((count, 28, 28), 255, np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
        header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())


def write_svhn(folder: Path) -> np.ndarray[Any, Any]:
    from scipy.io import savemat  # type: ignore[import-untyped]

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        images = generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        savemat(folder / f"{part}_32x32.mat", {"X": images, "y": labels})
    return images


def test_svhn_from_its_files(tmp_path: Path) -> None:
    images = write_svhn(tmp_path / "svhn")
    image_sources.load.cache_clear()
    make = functools.partial(ImageDataModule, dataset="svhn", batch_size=4, val_size=10, data_dir=str(tmp_path))
    data = make()
    data.setup()
    found, labels = everything(data.parts.test)
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2  # 10 stands for the digit 0
    assert torch.allclose(found, torch.from_numpy(images).permute(3, 2, 0, 1) / 255)
    (tmp_path / "svhn/train_32x32.mat").write_bytes(b"no matrix at all, but long enough to look at" * 9)
    image_sources.load.cache_clear()
    with pytest.raises(UserError, match=r"data=svhn: the files in .*svhn cannot be read"):
        make().setup()


def test_sets_of_one_shape_in_a_row(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist/MNIST/raw", "train", 40)
    write_idx(tmp_path / "mnist/MNIST/raw", "t10k", 20)
    write_svhn(tmp_path / "svhn")
    image_sources.load.cache_clear()
    shared = {"batch_size": 5, "val_size": 10, "data_dir": str(tmp_path), "image_size": 32, "fit": "pad"}
    members = {name: ImageDataModule(dataset=name, colour=True, **shared) for name in ("mnist", "svhn")}  # type: ignore[arg-type]
    data = DataSequence("both", members, 5, shared_classes=False)
    scenario = DomainSequence(head="task")
    tasks = build(scenario, data)
    assert data.shape == (3, 32, 32) and data.model_arguments()["data_classes"] == scenario.outputs(data) == 20
    images = everything(tasks[0].data.parts.test)[0]
    assert torch.equal(images, torch.nn.functional.pad(torch.ones(20, 3, 28, 28), (2,) * 4))
    assert set(everything(tasks[1].data.parts.test)[1].tolist()) == set(range(10, 20))
    batch = next(iter(scenario.joined(tasks).train_dataloader()))
    bright = batch["inputs"][:, :, 2:30, 2:30].amin((1, 2, 3)) == 1
    assert torch.equal(bright, batch["labels"] < 10)
    with pytest.raises(UserError, match=r"svhn has images of shape \(3, 32, 32\)"):
        grey = ImageDataModule(dataset="mnist", **shared)  # type: ignore[arg-type]
        DataSequence("both", {"mnist": grey, "svhn": members["svhn"]}, 5)
    with pytest.raises(UserError, match=r"data\.image_size=20: expected at least 28 with data\.fit=pad"):
        ImageDataModule(dataset="mnist", image_size=20, fit="pad")


def test_images_of_another_size() -> None:
    small, large = (ImageDataModule(image_size=size, batch_size=8, colour=True) for size in (None, 24))
    for data in (small, large):
        data.setup()
    assert large.model_arguments()["data_shape"] == (3, 24, 24) == large.presentation.shape
    a, b = (everything(data.parts.test)[0] for data in (small, large))
    assert b.shape == (360, 3, 24, 24) and torch.equal(b[:, 0], b[:, 2])
    assert torch.allclose(torch.nn.functional.avg_pool2d(b, 3), a, atol=0.35) and abs(float(b.mean() - a.mean())) < 0.01
    changed = build(Permuted(tasks=2), large)[1].data
    assert everything(changed.parts.test)[0].shape == (360, 3, 24, 24)
    assert large.parts.test.identity() != small.parts.test.identity()


def test_random_boxes_are_within_the_image_and_enlarged() -> None:
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    images = torch.stack([rows, rows.T])[None].expand(512, -1, -1, -1).byte()
    words = torch.randint(0, 2**32, (20, 512), generator=torch.Generator().manual_seed(0))
    found = random_resized_crop(images, words, (64, 48))
    assert found.shape == (512, 2, 64, 48)
    y, x = found[:, 0], found[:, 1]
    assert torch.allclose(y, y[:, :, :1].expand_as(y)) and torch.allclose(x, x[:, :1].expand_as(x))
    assert float(found.min()) >= 0 and float(found.max()) <= 31
    tall = (y[:, -1, 0] - y[:, 0, 0]) + 1
    wide = x[:, 0].amax(1) - x[:, 0].amin(1) + 1
    assert torch.allclose(tall, tall.round(), atol=1e-4) and torch.allclose(wide, wide.round(), atol=1e-4)
    share, ratio = tall * wide / 1024, wide / tall
    assert 0.06 < float(share.min()) < 0.12 and float(share.max()) > 0.9 and 0.4 < float(share.mean()) < 0.62
    assert float(ratio.min()) > 0.65 and float(ratio.max()) < 1.5
    mirrored = x[:, 0, 0] > x[:, 0, -1]
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    step = torch.diff(y[:, 8:-8, 0], dim=1)
    assert torch.allclose(step, (tall / 64)[:, None].expand_as(step), atol=1e-3)
