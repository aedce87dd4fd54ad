"""The smaller image sets from files in their own formats, classes kept of them, and how others look at them."""

from __future__ import annotations

import bz2
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.data import image_sources
from subspace_lab.data.images import ImageDataModule
from subspace_lab.data.presentation import Presentation
from subspace_lab.errors import UserError


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def build(**options: Any) -> ImageDataModule:
        given = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "batch_size": 4, "val_size": 10}
        module = ImageDataModule(**(given | options))
        module.configure(0, 1, 0)
        module.prepare_data()
        module.setup("fit")
        return module

    image_sources.load.cache_clear()
    return build


def rows(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([b["inputs"] for b in batches]), torch.cat([b["labels"] for b in batches])


def sizes(module: ImageDataModule) -> list[int]:
    return [module.describe()[part]["examples"] for part in ("train", "validation", "test")]


def write_idx(raw: Path, part: str, count: int) -> np.ndarray[Any, Any]:
    raw.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
        header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return images


@pytest.mark.parametrize(("dataset", "raw"), [("kmnist", "kmnist/KMNIST/raw"), ("notmnist", "notmnist/raw")])
def test_a_test_part_alone_is_cut_in_file_order(make: Any, tmp_path: Path, dataset: str, raw: str) -> None:
    images = write_idx(tmp_path / raw, "t10k", 100)
    half = make(dataset=dataset)
    assert sizes(half) == [70, 10, 20]
    assert half.describe()["note"] == "the test part alone: its first 80 images train, its last 20 test, in file order"
    test = rows(half.test_dataloader())
    assert torch.allclose(test[0][:, 0], torch.from_numpy(images[80:] / 255).float())
    assert test[1].tolist() == [*range(10), *range(10)]
    write_idx(tmp_path / raw, "train", 60)
    image_sources.load.cache_clear()
    whole = make(dataset=dataset)
    assert sizes(whole) == [50, 10, 100] and "note" not in whole.describe()


def test_cifar100_from_its_batches(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums, generator = {}, np.random.default_rng(0)
    pixels = {
        name: generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        for name, count in (("train", 300), ("test", 100))
    }
    for name, data in pixels.items():
        labels = [index % 100 for index in range(len(data))]
        content = {"data": data, "fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{k}" for k in range(100)]}, protocol=2))
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    # The sums of the real files are torchvision's; these small ones have others.
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    module = make(dataset="cifar100", val_size=100)
    assert sizes(module) == [200, 100, 100] and module.classes == 100
    assert module.model_arguments() == {"data_shape": (3, 32, 32), "data_classes": 100}
    images, labels = rows(module.test_dataloader())
    assert labels.tolist() == list(range(100))
    assert torch.allclose(images.flatten(1), torch.from_numpy(pixels["test"] / 255).float())
    kept = make(dataset="cifar100", classes=[42, 7], val_size=2)
    assert sizes(kept) == [4, 2, 2] and kept.classes == 2
    assert torch.equal(rows(kept.test_dataloader())[0], images[[7, 42]])
    assert rows(kept.test_dataloader())[1].tolist() == [1, 0]
    (folder / "train").write_bytes(b"not the file")
    image_sources.load.cache_clear()
    with pytest.raises(UserError, match=r"data=cifar100: .*cifar-100-python cannot be read"):
        make(dataset="cifar100")


def test_usps_from_its_files(make: Any, tmp_path: Path) -> None:
    (tmp_path / "usps").mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("usps.bz2", 40), ("usps.t.bz2", 20)):
        lines = [
            f"{index % 10 + 1} " + " ".join(f"{k + 1}:{v:.4f}" for k, v in enumerate(generator.uniform(-1, 1, 256)))
            for index in range(count)
        ]
        (tmp_path / "usps" / name).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    module = make(dataset="usps")
    assert sizes(module) == [30, 10, 20] and module.shape == (1, 16, 16)
    images, labels = rows(module.test_dataloader())
    first = [float(word.split(":")[1]) for word in lines[0].split()[1:]]
    assert labels.tolist() == [index % 10 for index in range(20)]
    assert np.allclose(images[0].flatten().numpy(), (np.array(first) + 1) / 2, atol=1 / 250)
    (tmp_path / "usps/usps.bz2").write_bytes(b"BZh9 not")
    image_sources.load.cache_clear()
    with pytest.raises(UserError, match=r"data=usps: the files in .*usps cannot be read"):
        make(dataset="usps")


def test_gtsrb_from_its_folders(make: Any, tmp_path: Path) -> None:
    from PIL import Image

    def sign(label: int, size: int) -> Image.Image:
        return Image.new("RGB", (size, size + 3), (label * 5, 100, 255 - label * 5))

    root = tmp_path / "gtsrb/GTSRB"
    for label in range(43):
        (root / f"Training/{label:05}").mkdir(parents=True)
        for track in range(2):
            sign(label, 20 + label).save(root / f"Training/{label:05}/{track:05}_00000.ppm")
    (root / "Final_Test/Images").mkdir(parents=True)
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for index, label in enumerate((42, 0, 17, 3)):
        sign(label, 50).save(root / f"Final_Test/Images/{index:05}.ppm")
        table += f"{index:05}.ppm;50;53;5;5;45;45;{label}\n"
    (tmp_path / "gtsrb/GT-final_test.csv").write_text(table)
    module = make(dataset="gtsrb", val_size=43)
    assert sizes(module) == [43, 43, 4] and module.classes == 43
    for loader in (module.val_dataloader(), module.test_dataloader()):
        images, labels = rows(loader)
        assert images.shape[1:] == (3, 32, 32)
        assert torch.allclose(images[:, 0], (labels * 5 / 255)[:, None, None].expand(-1, 32, 32), atol=1e-6)
    assert labels.tolist() == [42, 0, 17, 3]
    (root / "Final_Test/Images/00000.ppm").unlink()
    image_sources.load.cache_clear()
    with pytest.raises(UserError, match=r"data=gtsrb: .*GT-final_test\.csv and its images cannot be read"):
        make(dataset="gtsrb")


@pytest.mark.parametrize("dataset", ["kmnist", "notmnist", "usps", "cifar100", "gtsrb"])
def test_absent_sets_are_one_line(make: Any, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str | None = None) -> None:
        raise ConnectionError("no network: example.org has no address here")

    monkeypatch.setattr(image_sources, "require_network", offline)
    with pytest.raises(UserError) as told:
        make(dataset=dataset)
    text = str(told.value)
    assert "\n" not in text and str(tmp_path / dataset) in text and "SUBSPACE_DATA=" in text
    assert ("no network" in text) == (dataset in ("kmnist", "usps"))


def test_kept_classes_are_renumbered_in_the_order_given(make: Any) -> None:
    whole, kept, other = make(val_size=144), make(classes=[7, 2, 5], val_size=40), make(classes=[2, 7, 5], val_size=40)
    found = kept.describe()
    assert found["classes"] == kept.classes == 3 and found["kept_classes"] == [7, 2, 5]
    assert kept.model_arguments()["data_classes"] == 3 and "kept_classes" not in whole.describe()
    images, labels = rows(whole.test_dataloader())
    mine = torch.isin(labels, torch.tensor([7, 2, 5]))
    numbers = torch.tensor([-1, -1, 1, -1, -1, 2, -1, 0, -1, -1])
    few = rows(kept.test_dataloader())
    assert torch.equal(few[0], images[mine]) and torch.equal(few[1], numbers[labels[mine]])
    assert torch.bincount(rows(kept.val_dataloader())[1]).max() <= 14
    hashes = [module.describe()[part]["hash"] for module in (whole, kept, other) for part in ("train", "test")]
    assert len(set(hashes)) == 6
    drawn = rows(make(classes=[7, 2, 5], val_size=40, shuffle_labels=True).train_eval_dataloader())[1]
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": [1, 10]}, r"data\.classes: digits has no class 10 \(its classes are 0 … 9\)"),
        ({"classes": [1, 3, 1]}, r"data\.classes names class 1 twice"),
        ({"classes": [4]}, r"data\.classes=\[4\]: expected at least 2"),
        ({"mixup": -1.0}, r"data\.mixup=-1\.0: expected 0 or more"),
        ({"cutmix": 1.0, "batch_size": 5}, r"data\.batch_size=5: .*even number \(data\.batch_size=6\)"),
        ({"label_smoothing": 1.0}, r"data\.label_smoothing=1\.0"),
        ({"loss": "hinge"}, r"data\.loss=hinge: no such loss \(cross_entropy or bce\)"),
    ],
)
def test_recipe_values_out_of_range(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_presentation_converts_channels_size_and_scale(make: Any) -> None:
    images = torch.rand(5, 3, 20, 30)
    grey = Presentation((1, 20, 30), (0.2,), (0.5,)).convert(images)
    luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    assert torch.allclose(grey[:, 0], (luma - 0.2) / 0.5, atol=1e-6)
    colour = Presentation((3, 20, 30), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25)).convert(grey * 0.5 + 0.2)
    assert torch.allclose(colour[:, 2], (luma - 0.3) / 0.25, atol=1e-5)
    flat = torch.full((1, 1, 8, 8), 0.7)
    assert torch.allclose(Presentation((3, 13, 29), (0.0,) * 3, (1.0,) * 3).convert(flat), torch.tensor(0.7))
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2.0
    small = Presentation((1, 4, 4), (0.0,), (1.0,)).convert(checks[None, None])
    assert float((small - 0.5).abs().max()) < 0.05  # antialiased: without it, the checks would come out as 0 and 1
    with pytest.raises(UserError, match=r"images of 2 channels for a model of 3"):
        Presentation((3, 4, 4), (0.0,) * 3, (1.0,) * 3).convert(torch.rand(1, 2, 4, 4))


def test_examples_as_another_set_sees_them(make: Any) -> None:
    digits = make(mean=[0.3], std=[0.4], augment="crop_flip", shuffle_pixels=True)
    assert digits.presentation == Presentation((1, 8, 8), (0.3,), (0.4,))
    assert digits.examples_as(digits.presentation) is digits.parts
    raw = digits.examples_as(Presentation((1, 8, 8), (0.0,), (1.0,)))
    indices = np.array([3, 0, 9])
    for part in ("train", "validation", "test"):
        own, seen = (getattr(parts, part).batch(indices) for parts in (digits.parts, raw))
        assert torch.allclose(seen["inputs"], own["inputs"] * 0.4 + 0.3, atol=1e-6)
        assert torch.equal(seen["labels"], own["labels"]) and float(seen["inputs"].max()) == 1.0
        assert len(getattr(raw, part)) == len(getattr(digits.parts, part))
    wide = digits.examples_as(Presentation((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    assert wide.test.batch(indices)["inputs"].shape == (3, 3, 32, 32)
    assert len({parts.test.identity() for parts in (digits.parts, raw, wide)}) == 3
