"""Image batches: what is in them, in which order, and that a position is enough to go on."""

from __future__ import annotations

import itertools
import logging
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.data import image_sources, image_trees
from subspace_lab.data.image_examples import crop_flip
from subspace_lab.data.images import ImageDataModule
from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.errors import UserError


def make(rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any) -> ImageDataModule:
    module = ImageDataModule(**options)
    module.configure(rank, world_size, seed)
    module.prepare_data()
    module.setup("fit")
    return module


def take(module: ImageDataModule, count: int) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        module.batch_consumed()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def rows(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([b["inputs"] for b in batches]), torch.cat([b["labels"] for b in batches])


def test_digits_are_split_by_class_and_normalised() -> None:
    module = make(mean=[0.3053], std=[0.3760])
    found = module.describe()
    assert [found[part]["examples"] for part in ("train", "validation", "test")] == [1293, 144, 360]
    assert found["shape"] == [1, 8, 8] and found["classes"] == 10
    images, labels = rows(module.train_eval_dataloader())
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and images.shape == (1293, 1, 8, 8)
    assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
    for loader, size in ((module.val_dataloader(), 144), (module.test_dataloader(), 360)):
        counts = torch.bincount(rows(loader)[1], minlength=10)
        assert int(counts.sum()) == size and int(counts.max() - counts.min()) <= 4
    whole = torch.cat([rows(part)[0] for part in (module.train_eval_dataloader(), module.val_dataloader())])
    assert len(torch.unique(torch.cat([whole, rows(module.test_dataloader())[0]]).flatten(1), dim=0)) == 1797


def test_order_follows_the_seed_and_an_epoch_has_every_image_once() -> None:
    assert same(take(make(), 3), take(make(), 3))
    assert not same(take(make(), 3), take(make(seed=1), 3))
    module = make(batch_size=3, val_size=0)  # 1437 = 3 · 479
    once = torch.cat([batch["inputs"] for batch in take(module, 479)])
    assert len(torch.unique(once.flatten(1), dim=0)) == 1437
    assert module.describe()["held_out"] is False and len(rows(module.val_dataloader())[1]) == 143


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_resume_and_sharding_are_exact(augment: str, tmp_path: Path) -> None:
    whole = take(make(augment=augment), 14)  # past the first epoch
    cut = make(augment=augment)
    take(cut, 9)
    next(iter(cut.train_dataloader()))  # fetched ahead, never used
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make(augment=augment)
    resumed.load_state_dict(state)
    assert same(take(resumed, 5), whole[9:])
    early = ImageDataModule(augment=augment)  # type: ignore[arg-type]
    early.load_state_dict(state)  # before there is any data
    early.configure(0, 1, 0)
    early.setup("fit")
    assert same(take(early, 5), whole[9:])
    halves = [take(make(rank, 2, augment=augment, batch_size=64), 14) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch["inputs"], torch.cat([part["inputs"] for part in parts]))


def test_other_data_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(shuffle_labels=True).load_state_dict(make().state_dict())
    assert "differs from the checkpoint's" in caplog.text


def test_validation_is_counted_once_on_any_number_of_processes() -> None:
    for world_size in (1, 2, 3):
        parts = [list(make(rank, world_size, batch_size=7).val_dataloader()) for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        assert sum(int((batch["labels"] != IGNORE).sum()) for part in parts for batch in part) == 144


def test_smaller_training_sets_lie_in_larger_ones() -> None:
    def training(fraction: float) -> set[bytes]:
        images = rows(make(train_fraction=fraction, batch_size=8).train_eval_dataloader())[0]
        return {image.numpy().tobytes() for image in images}

    tenth, half, whole = (training(fraction) for fraction in (0.1, 0.5, 1.0))
    assert tenth < half < whole and [len(tenth), len(half), len(whole)] == [129, 646, 1293]


def test_shuffled_pixels_are_one_permutation_for_all() -> None:
    plain, shuffled = make(), make(shuffle_pixels=True, seed=5)
    a, b = (rows(module.train_eval_dataloader())[0].flatten(1) for module in (plain, shuffled))
    assert not torch.equal(a, b)
    assert torch.equal(a.sort(1).values, b.sort(1).values)
    order = image_sources_order()
    assert torch.equal(a[:, order], b)
    c, d = (rows(module.test_dataloader())[0].flatten(1) for module in (plain, shuffled))
    assert torch.equal(c[:, order], d)


def image_sources_order() -> torch.Tensor:
    from subspace_lab.data.splits import fixed_order

    return torch.from_numpy(fixed_order(64, "pixels"))


def test_shuffled_labels_are_random_fixed_and_for_training_only() -> None:
    plain, shuffled, again = make(), make(shuffle_labels=True), make(shuffle_labels=True, seed=9)
    true, drawn = (rows(module.train_eval_dataloader())[1] for module in (plain, shuffled))
    assert torch.equal(drawn, rows(again.train_eval_dataloader())[1])
    assert 0.05 < float((true == drawn).float().mean()) < 0.15
    assert int(torch.bincount(drawn, minlength=10).min()) > 80
    for loader in ("val_dataloader", "test_dataloader"):
        assert torch.equal(rows(getattr(plain, loader)())[1], rows(getattr(shuffled, loader)())[1])
    assert plain.describe()["train"]["hash"] != shuffled.describe()["train"]["hash"]
    assert plain.describe()["test"]["hash"] == shuffled.describe()["test"]["hash"]


def test_splits_are_the_same_everywhere() -> None:
    """Golden: another split would make every figure incomparable with the ones before."""
    found = make(mean=[0.3053], std=[0.3760]).describe()
    assert found["train"]["hash"] == "4932d0c48516873026da6e29bc33db40"
    assert found["test"]["hash"] == "8b5efc4eb3743f572e61a8a0e4b0d201"


def test_crop_flip_moves_by_at_most_four_pixels() -> None:
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4] = 255
    words = torch.arange(20_000, dtype=torch.int64) * 2_654_435_761 % 2**32
    moved = crop_flip(image.expand(20_000, -1, -1, -1), words)
    places = moved.flatten(1).argmax(1)[moved.flatten(1).amax(1) > 0]
    assert len(places) == 20_000 and len(places.unique()) == 81
    ramp = torch.arange(9, dtype=torch.uint8).expand(1, 1, 9, 9)
    still = 4 + (4 << 12)
    assert torch.equal(crop_flip(ramp, torch.tensor([still])), ramp)
    assert torch.equal(crop_flip(ramp, torch.tensor([still | 1 << 24])), ramp.flip(-1))


def write_idx(folder: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    raw, generator = tmp_path / "mnist" / "MNIST" / "raw", np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(raw, f"{part}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(raw, f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_mnist_from_files(mnist_folder: Path) -> None:
    module = make(dataset="mnist", data_dir=str(mnist_folder), val_size=10, batch_size=5)
    assert [module.describe()[part]["examples"] for part in ("train", "validation", "test")] == [50, 10, 20]
    assert sorted(rows(module.val_dataloader())[1].tolist()) == list(range(10))
    images, labels = rows(module.test_dataloader())
    assert images.shape == (20, 1, 28, 28) and labels.tolist() == [*range(10), *range(10)]
    raw = np.frombuffer((mnist_folder / "mnist/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    assert torch.allclose(images.flatten(), torch.from_numpy(raw / 255.0).float())


def test_cifar10_tree_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(["airplane", "bird", "cat"]):
            folder = tmp_path / "cifar10" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                mode = "L" if index == 0 else "RGB"  # a grey file among the coloured
                shape = (32, 32) if mode == "L" else (32, 32, 3)
                Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode).save(
                    folder / f"{index}_{label}.png"
                )
    options = {"dataset": "cifar10", "data_dir": str(tmp_path), "val_size": 3, "batch_size": 5}
    options |= {"cache_dir": str(tmp_path / "cache"), "mean": [0.5, 0.4, 0.3], "std": [0.2]}
    first = make(**options).describe()
    assert [first[part]["examples"] for part in ("train", "validation", "test")] == [15, 3, 9]
    (cached,) = (tmp_path / "cache" / "images").iterdir()

    def gone(*args: Any) -> Any:
        raise AssertionError("decoded again")

    image_sources.load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(image_trees, "decode", gone)
        assert make(**options).describe() == first
    cached.write_bytes(b"damaged")
    image_sources.load.cache_clear()
    assert make(**options).describe() == first
    pixel = np.asarray(Image.open(tmp_path / "cifar10/test/airplane/1_0.png"))[0, 0] / 255
    expected = (pixel - np.array([0.5, 0.4, 0.3])) / 0.2
    assert np.allclose(rows(make(**options).test_dataloader())[0][1, :, 0, 0].numpy(), expected, atol=1e-5)
    (tmp_path / "cifar10/test/cat/1_2.png").write_bytes(b"no image, but of another size")
    image_sources.load.cache_clear()
    with pytest.raises(UserError, match=r"data=cifar10: .*1_2\.png cannot be read"):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0: expected at least 1"),
        ({"batch_size": 2000}, r"data\.batch_size=2000: digits has only 1293 training examples"),
        ({"val_size": -1}, r"data\.val_size=-1"),
        ({"val_size": 1437}, r"data\.val_size=1437 leaves nothing to train on: digits has 1437.*data\.val_size=143"),
        ({"train_fraction": 0.0}, r"data\.train_fraction=0\.0"),
        ({"dataset": "digit"}, r"data\.dataset=digit: no such image set \(one of digits, mnist"),
        ({"mean": [0.1, 0.2]}, r"data\.mean=\[0\.1, 0\.2\]: expected 1 or 1 numbers"),
        ({"std": [0.0]}, r"data\.std=\[0\.0\]: expected 1 or 1 positive"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_absent_data_is_one_line(dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str | None = None) -> None:
        raise ConnectionError("no network: example.org has no address here")

    monkeypatch.setattr(image_sources, "require_network", offline)
    with pytest.raises(UserError) as told:
        make(dataset=dataset, data_dir=str(tmp_path))
    text = str(told.value)
    assert "\n" not in text and str(tmp_path / dataset) in text
    assert "SUBSPACE_DATA=" in text and "data.data_dir=" in text
    assert ("no network" in text) == (dataset != "cifar10")


def test_damaged_files_are_one_line(mnist_folder: Path) -> None:
    path = mnist_folder / "mnist/MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"data=mnist: the files in .* cannot be read"):
        make(dataset="mnist", data_dir=str(mnist_folder), val_size=10, batch_size=5)


def test_an_epoch_of_batches_costs_little() -> None:
    """60000 images of MNIST's size as batches of 128, far below a second (0.1 s when the machine is idle)."""
    from subspace_lab.data.image_examples import ImageExamples, Look
    from subspace_lab.data.order import EpochOrder

    images = torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8)
    look = Look((1, 28, 28), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    examples = ImageExamples(images, torch.zeros(60_000, dtype=torch.int64), torch.arange(60_000), look, "")
    order = EpochOrder(60_000, 0)
    start = time.process_time()
    for index in range(469):
        examples.batch(order.batch(index, 128, 0, 1))
    assert time.process_time() - start < 1.0
