"""mini-ImageNet from what people have of it: arrays, folders, and the files of few-shot learning."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.app import compose_config
from subspace_lab.data.image_sources import load
from subspace_lab.data.mini_imagenet import mini_imagenet
from subspace_lab.errors import UserError

HINT = "say where"
NOTE = "divided for few-shot learning: the first five sixths of each class train, the others test, in file order"


def grey(value: int) -> np.ndarray[Any, Any]:
    """An image whose every pixel says which it is."""
    return np.full((84, 84, 3), value, dtype=np.uint8)


def read(folder: Path) -> tuple[list[int], list[int], list[int], list[int], str]:
    """The value of each training image, labels, of each test image, labels; note."""
    parts, note = mini_imagenet(folder, folder.parent / "cache", HINT)
    for images in (parts[0], parts[2]):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 84, 84)
        assert torch.equal(images.amax((1, 2, 3)), images.amin((1, 2, 3)))
    values = [images[:, 0, 0, 0].tolist() for images in (parts[0], parts[2])]
    return values[0], parts[1].tolist(), values[1], parts[3].tolist(), note


def tree(folder: Path, images: dict[str, list[int]], size: int = 84) -> None:
    from PIL import Image

    for name, values in images.items():
        (folder / name).mkdir(parents=True)
        for place, value in enumerate(values):
            Image.new("RGB", (size, size + 3), (value,) * 3).save(folder / name / f"{place:04}.png")


def cache(folder: Path, part: str, images: list[int], classes: dict[str, list[int]]) -> None:
    folder.mkdir(exist_ok=True)
    content = {"image_data": np.stack([grey(value) for value in images]), "class_dict": classes}
    (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(content, protocol=2))


def test_arrays_as_the_release_reads_them(tmp_path: Path) -> None:
    for part, values in (("train", [5, 6, 7]), ("test", [9])):
        pixels = np.stack([grey(value) for value in values])
        pixels[0, 3, 8] = (10, 20, 30)
        np.save(tmp_path / f"{part}_x.npy", pixels)
        np.save(tmp_path / f"{part}_y.npy", np.array([value % 5 for value in values]))
    parts, note = mini_imagenet(tmp_path, tmp_path, HINT)
    assert parts[0][0, :, 3, 8].tolist() == [10, 20, 30]  # channels first, rows before columns
    assert parts[0][1:, 0, 0, 0].tolist() == [6, 7] and parts[1].tolist() == [0, 1, 2] and parts[3].tolist() == [4]
    assert note == "" and parts[1].dtype == torch.int64
    np.save(tmp_path / "train_x.npy", np.zeros((3, 84, 84, 3)))
    with pytest.raises(UserError, match=r"float64 \(3, 84, 84, 3\); expected uint8 \(n, 84, 84, 3\)"):
        mini_imagenet(tmp_path, tmp_path, HINT)
    (tmp_path / "test_y.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"test_y\.npy cannot be read"):
        mini_imagenet(tmp_path, tmp_path, HINT)


def test_folders_with_the_same_classes_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    tree(folder / "train", {"n02": [1, 2, 3], "n01": [4]}, size=100)
    tree(folder / "test", {"n01": [5], "n02": [6, 7]}, size=60)
    assert read(folder) == ([4, 1, 2, 3], [0, 1, 1, 1], [5, 6, 7], [0, 1, 1], "")


def test_what_is_divided_for_few_shot_learning_is_divided_anew(tmp_path: Path) -> None:
    images = {f"n{k:02}": [10 * k + i for i in range(6)] for k in range(4)}
    # class 3 in the training folder, 1 and 2 in val, 0 in test: numbered by name all the same
    folders = {"train": ("n03",), "val": ("n01", "n02"), "test": ("n00",)}
    expected = (
        [10 * k + i for k in range(4) for i in range(5)],
        [k for k in range(4) for _ in range(5)],
        [10 * k + 5 for k in range(4)],
        [0, 1, 2, 3],
        NOTE,
    )
    for part, names in folders.items():
        tree(tmp_path / "few" / part, {name: images[name] for name in names})
    assert read(tmp_path / "few") == expected
    tree(tmp_path / "flat", images)
    assert read(tmp_path / "flat") == expected
    # in the pickles the images of a class need not lie together
    pickled = tmp_path / "pickled"
    cache(pickled, "train", images["n03"], {"n03": list(range(6))})
    mixed = [value for pair in zip(images["n02"], images["n01"], strict=True) for value in pair]
    cache(pickled, "validation", mixed, {"n02": list(range(0, 12, 2)), "n01": list(range(1, 12, 2))})
    cache(pickled, "test", images["n00"], {"n00": list(range(6))})
    train, train_labels, test, test_labels, note = read(pickled)
    assert sorted(zip(train, train_labels, strict=True)) == sorted(zip(*expected[:2], strict=True))
    assert sorted(zip(test, test_labels, strict=True)) == sorted(zip(*expected[2:4], strict=True)) and note == NOTE


def test_a_pickle_runs_no_code_and_says_what_is_wrong(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    for part in ("train", "val", "test"):
        cache(tmp_path, part, [1, 2], {part: [0, 1]})
    good = (tmp_path / "mini-imagenet-cache-val.pkl").read_bytes()
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps({"image_data": Harm(), "class_dict": {}}))
    with pytest.raises(
        UserError, match=r"mini-imagenet-cache-val\.pkl cannot be read \(it wants .*, which is no array"
    ):
        mini_imagenet(tmp_path, tmp_path, HINT)
    assert not (tmp_path / "harm").exists()
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(good[:-20])
    with pytest.raises(UserError, match=r"mini-imagenet-cache-val\.pkl cannot be read"):
        mini_imagenet(tmp_path, tmp_path, HINT)
    cache(tmp_path, "val", [1, 2], {"a": [0], "b": [0]})
    with pytest.raises(UserError, match="do not name every image once"):
        mini_imagenet(tmp_path, tmp_path, HINT)


@pytest.mark.parametrize("there", [False, True])
def test_where_nothing_is_there_is_said_in_one_line(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "mini_imagenet/train").mkdir(parents=True)
    with pytest.raises(UserError) as told:
        load("mini_imagenet", tmp_path, tmp_path)
    text = str(told.value)
    assert "\n" not in text and str(tmp_path / "mini_imagenet") in text and "SUBSPACE_DATA=" in text
    assert "train_x.npy" in text and "mini-imagenet-cache-*.pkl" in text


def test_the_sequence_has_twenty_tasks_of_five_classes(tmp_path: Path) -> None:
    from subspace_lab.build import instantiate

    cfg = compose_config(
        ["data=split_mini_imagenet", f"data.data_dir={tmp_path}", "data.val_size=0", "data.batch_size=5"]
    )
    folder = tmp_path / "mini_imagenet"
    folder.mkdir()
    for part, times in (("train", 3), ("test", 1)):
        labels = np.repeat(np.arange(100), times)
        np.save(folder / f"{part}_x.npy", np.stack([grey(int(label)) for label in labels]))
        np.save(folder / f"{part}_y.npy", labels)
    data: Any = instantiate(cfg.data)
    data.configure(0, 1, 0)
    data.setup()
    tasks = instantiate(cfg.scenario).build(data, 0)
    assert len(tasks) == 20 and [len(task.columns) for task in tasks] == [5] * 20
    assert [len(task.data.parts.train) for task in tasks] == [15] * 20
    batch = tasks[3].data.parts.test.batch(np.arange(5))
    assert batch["labels"].tolist() == [15, 16, 17, 18, 19] and batch["inputs"].shape == (5, 3, 84, 84)
    white = (15 / 255 - 0.47313006) / 0.27292014
    assert torch.allclose(batch["inputs"][0, 0], torch.full((84, 84), white), atol=1e-5)
