"""A tree of image files as batches: which images, in which order, and augmented by their place alone."""

from __future__ import annotations

import itertools
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from subspace_lab.data import image_listing
from subspace_lab.data.folder_examples import RepeatedOrder
from subspace_lab.data.image_folder import ImageFolderDataModule
from subspace_lab.data.order import EpochOrder
from subspace_lab.data.packing import Batch
from subspace_lab.data.presentation import Presentation
from subspace_lab.errors import UserError

CLASSES = ("ant", "bee", "cow")
EVERYTHING = {"augment": "rand_augment", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "repeated_augment": 3}


def colour(label: int, index: int) -> tuple[int, int, int]:
    """Of image `index` of a class: no two are alike, and the class is in the red."""
    return (60 + 60 * label, 5 * index, 200 - 3 * index)


def plant(root: Path, counts: dict[str, int], suffix: str = "png") -> None:
    """Write a tree of images of many sizes, with noise around their colour; every third lies one folder deeper."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for label, name in enumerate(CLASSES):
            for index in range(count):
                folder = root / part / name / ("deep" if index % 3 == 2 else "")
                folder.mkdir(parents=True, exist_ok=True)
                noise = generator.integers(0, 40, (20 + index, 26 + label, 3))
                pixels = (np.asarray(colour(label, index)) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}_{index:02}.{suffix}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    plant(root, {"train": 12, "val": 4})
    return root


@pytest.fixture
def make(tree: Path, tmp_path: Path) -> Any:
    def build(rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any) -> ImageFolderDataModule:
        given: dict[str, Any] = {"root": str(tree), "cache_dir": str(tmp_path / "cache"), "num_workers": 0}
        given |= {"image_size": 16, "batch_size": 4, "val_size": 6}
        module = ImageFolderDataModule(**(given | options))
        module.configure(rank, world_size, seed)
        module.prepare_data()
        module.setup("fit")
        return module

    return build


def take(module: ImageFolderDataModule, count: int) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        module.batch_consumed()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def sizes(module: ImageFolderDataModule) -> list[int]:
    return [module.describe()[part]["examples"] for part in ("train", "validation", "test")]


def files(examples: Any) -> set[str]:
    return {examples.listing.path(int(row)) for row in examples.rows}


def test_val_is_the_test_part_and_train_gives_validation(make: Any, tree: Path) -> None:
    module = make()
    assert sizes(module) == [30, 6, 12] and module.classes == 3 and module.train_rows == 30
    assert module.describe()["parts"] == {"train": "train", "validation": "train, held out", "test": "val"}
    assert module.model_arguments() == {"data_shape": (3, 16, 16), "data_classes": 3}
    train, validation, test = (files(part) for part in vars(module.parts).values())
    assert not train & validation
    assert train | validation == {str(path) for path in (tree / "train").rglob("*.png")}
    assert test == {str(path) for path in (tree / "val").rglob("*.png")}
    labels = torch.cat([batch["labels"] for batch in module.val_dataloader()])
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    assert files(make(seed=5).parts.validation) == validation


def test_what_is_held_out_follows_from_the_folders(make: Any, tmp_path: Path) -> None:
    for name, parts, options, expected, sources in (
        ("all", {"train": 4, "valid": 2, "test": 3}, {"val_size": None}, [12, 6, 9], ["train", "valid", "test"]),
        ("test", {"train": 4, "test": 3}, {}, [6, 6, 9], ["train", "train, held out", "test"]),
        ("alone", {"train": 7}, {"val_size": 3}, [15, 3, 3], ["train", "train, held out", "train, held out"]),
        ("tenth", {"train": 11, "val": 1}, {"val_size": None}, [30, 3, 3], ["train", "train, held out", "val"]),
        ("zero", {"train": 11, "val": 1}, {"val_size": 0}, [33, 3, 3], ["train", "train, trained on", "val"]),
    ):
        plant(tmp_path / name, parts)
        module = make(root=str(tmp_path / name), **options)
        assert sizes(module) == expected and list(module.describe()["parts"].values()) == sources
        assert module.describe()["held_out"] is (name != "zero")
        found = [files(part) for part in vars(module.parts).values()]
        assert len(set.union(*found)) == sum(expected) - (3 if name == "zero" else 0)
    (tmp_path / "all/train/ant/new.png").write_bytes((tmp_path / "all/train/ant/train_00.png").read_bytes())
    assert sizes(make(root=str(tmp_path / "all"), val_size=None)) == [13, 6, 9]
    with pytest.raises(UserError, match=r"data\.val_size=6: .* has a validation folder of its own \(valid\)"):
        make(root=str(tmp_path / "all"))
    with pytest.raises(UserError, match=r"data\.val_size=0: .* neither val nor test"):
        make(root=str(tmp_path / "alone"), val_size=0)
    (tmp_path / "test/test").rename(tmp_path / "test/gone")
    (tmp_path / "test/test").mkdir()  # a test folder of bare files, without classes
    Image.new("RGB", (8, 8)).save(tmp_path / "test/test/1.png")
    assert make(root=str(tmp_path / "test"), val_size=2).describe()["parts"]["test"] == "train, held out"


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop", "rand_augment", "three_augment"])
def test_batches_depend_on_seed_and_place_alone(make: Any, augment: str) -> None:
    options = {**EVERYTHING, "augment": augment}
    whole = take(make(**options), 10)  # past the first epoch
    assert whole[0]["inputs"].shape == (4, 3, 16, 16) and whole[0]["inputs"].dtype == torch.float32
    assert same(take(make(**options, num_workers=2), 10), whole)
    assert not same(take(make(**options, seed=1), 1), whole[:1])
    cut = make(**options, num_workers=1)
    take(cut, 6)
    state = cut.state_dict()
    resumed = make(**options)
    resumed.load_state_dict(state)
    assert same(take(resumed, 4), whole[6:])
    halves = [take(make(rank, 2, **options), 5) for rank in range(2)]  # of the same size each: batches 2k and 2k + 1
    assert same([halves[k % 2][k // 2] for k in range(10)], whole)


def test_augmented_images_do_not_depend_on_the_batch_they_are_in(make: Any) -> None:
    options = {"augment": "three_augment", "erasing": 0.5}
    whole = torch.cat([batch["inputs"] for batch in take(make(**options, batch_size=12), 3)])
    small = torch.cat([batch["inputs"] for batch in take(make(**options, batch_size=2), 18)])
    halves = [take(make(rank, 2, **options, batch_size=3), 6) for rank in range(2)]
    assert torch.equal(whole, small)
    assert torch.equal(whole, torch.cat([half[k]["inputs"] for k in range(6) for half in halves]))


def test_the_runs_own_generators_are_left_alone(make: Any) -> None:
    loader = iter(make(**EVERYTHING).train_dataloader())
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[index, union-attr]
    next(loader)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]


def test_augmentation_changes_images_and_no_augmentation_does_not(make: Any) -> None:
    plain = make(augment="none", batch_size=30)
    epoch = take(plain, 2)
    first, second = ({x.numpy().tobytes() for x in batch["inputs"]} for batch in epoch)
    assert first == second and len(first) == 30
    evaluated = {x.numpy().tobytes() for batch in plain.train_eval_dataloader() for x in batch["inputs"]}
    assert evaluated == first
    for augment in ("crop_flip", "random_resized_crop", "rand_augment", "three_augment"):
        moved = {x.numpy().tobytes() for x in take(make(augment=augment, batch_size=30), 1)[0]["inputs"]}
        assert len(moved & first) < 10
    erased = take(make(augment="none", erasing=1.0, batch_size=30), 1)[0]["inputs"]
    still = take(make(augment="none", batch_size=30), 1)[0]["inputs"]
    share = (erased != still).any(1).flatten(1).float().mean(1)
    assert 0.01 < float(share.mean()) < 0.34 and float((erased - still)[erased != still].std()) > 0.5


def test_labels_belong_to_their_images(make: Any, tree: Path) -> None:
    module = make(augment="random_resized_crop", classes=["cow", 0])
    assert module.classes == 2 and module.describe()["kept_classes"] == ["cow", "ant"] and sizes(module) == [18, 6, 8]
    for batches in (take(module, 5), list(module.test_dataloader())):
        for batch in batches:
            red = batch["inputs"][:, 0].mean((1, 2)) * 0.229 + 0.485
            assert torch.equal((red < 0.5).long(), batch["labels"])  # cow, now 0, is the redder
    picture = np.asarray(Image.open(tree / "val/ant/val_00.png"))  # 20 × 26
    image = next(iter(make(image_size=20, crop_ratio=1.0).test_dataloader()))["inputs"][1]  # after deep/val_02.png
    expected = (picture[:, 3:23].transpose(2, 0, 1) / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    assert np.allclose(image.numpy(), expected, atol=1e-5)
    assert next(iter(make(eval_size=24).test_dataloader()))["inputs"].shape[-1] == 24


def test_repeats_are_neighbours(make: Any) -> None:
    plain, repeated = EpochOrder(10, 3), RepeatedOrder(10, 3, 3)
    expected = np.repeat(plain.rows(0, 20), 3)
    assert np.array_equal(repeated.rows(0, 60), expected)
    assert all(np.array_equal(repeated.rows(k, 7), expected[k : k + 7]) for k in range(40))
    batch = take(make(repeated_augment=2, augment="rand_augment"), 1)[0]
    assert batch["labels"].tolist()[::2] == batch["labels"].tolist()[1::2]
    assert not torch.equal(batch["inputs"][0], batch["inputs"][1])


def test_other_presentations(make: Any) -> None:
    module = make()
    assert module.presentation == Presentation((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = module.examples_as(Presentation((1, 28, 28), (0.1,), (0.5,)))
    batch = grey.test.batch(np.arange(5))
    assert batch["inputs"].shape == (5, 1, 28, 28) and len(grey.train) == 30 and len(grey.validation) == 6
    colours = module.examples_as(Presentation((3, 28, 28), (0.0,) * 3, (1.0,) * 3)).test.batch(np.arange(5))["inputs"]
    luma = (colours * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(batch["inputs"] * 0.5 + 0.1, luma, atol=0.01)
    assert torch.equal(batch["labels"], module.parts.test.batch(np.arange(5))["labels"])
    assert grey.test.identity() != module.parts.test.identity()


def test_the_list_of_files_is_kept(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make().describe()

    def gone(*args: Any) -> Any:
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(image_listing, "_images", gone)
        assert make().describe() == before


def test_an_unwritable_cache_is_no_error(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert sizes(make(cache_dir=str(tmp_path / "file/below"))) == [30, 6, 12]
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_one_line_with_its_path(make: Any, tmp_path: Path, num_workers: int) -> None:
    plant(tmp_path / "broken", {"train": 3, "val": 2}, suffix="jpg")
    victim = tmp_path / "broken/val/bee/val_01.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    module = make(root=str(tmp_path / "broken"), val_size=3, num_workers=num_workers)
    with pytest.raises(UserError) as error:
        list(module.test_dataloader())
    assert str(victim) in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "broken/train").rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^image .*train/.*\.jpg cannot be read \(cannot identify image file"):
        take(module, 1)


def test_trees_that_do_not_fit_are_told(make: Any, tmp_path: Path) -> None:
    plant(tmp_path, {"train": 3, "val": 2})
    (tmp_path / "val/dog").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val/dog/1.png")
    with pytest.raises(UserError, match=r"class folder .*val/dog has no counterpart in .*/train"):
        make(root=str(tmp_path), val_size=2)
    os.rename(tmp_path / "val/dog", tmp_path / "train/elk")
    (tmp_path / "train/elk/1.png").unlink()
    with pytest.raises(UserError, match=r"class folder .*train/elk has no images"):
        make(root=str(tmp_path), val_size=2)
    with pytest.raises(UserError, match=r"nowhere/train: no such folder; expected train/<class>/.*data\.root="):
        make(root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 36}, r"data\.val_size=36 leaves nothing to train on: .* 36 images"),
        ({"classes": ["ant", "bie"]}, r"image_folder has no class 'bie' \(did you mean 'bee'"),
        ({"classes": [0, 3]}, r"has no class 3 \(its classes are 0 … 2\)"),
        ({"classes": [0, "ant"]}, r"names class 'ant' twice"),
        ({"classes": [1]}, r"data\.classes=\[1\]: expected at least 2"),
        ({"mixup": 0.1, "batch_size": 3}, r"data\.batch_size=3: .* even number"),
        ({"crop_ratio": 0.0}, r"data\.crop_ratio=0\.0"),
        ({"magnitude": 11}, r"data\.magnitude=11"),
        ({"std": [1.0, 0.0, 1.0]}, r"data\.mean=.*std above 0"),
        ({"repeated_augment": 0}, r"data\.repeated_augment=0: expected at least 1"),
    ],
)
def test_folder_values_out_of_range(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)
