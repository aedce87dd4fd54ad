"""Small image sets that come as a file per image: decoded once, then one file of bytes."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subspace_lab.errors import UserError

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
Entry = tuple[str, int, str, int]
"""(folder below the part's, label, file name, bytes) of an image."""

_IMAGES = (".jpg", ".jpeg", ".png", ".ppm")


def decoded(
    dataset: str,
    shape: tuple[int, int, int],
    parts: Sequence[tuple[Path, list[Entry]]],
    cache_dir: Path,
    *,
    resize: bool = False,
) -> Tensors:
    """The images of a training and a test part: minutes of decoding for one file in the cache.

    Args:
        dataset: its name.
        shape: (3, height, width) of every image.
        parts: folder and entries of the training part, then of the test part.
        cache_dir: where the decoded images are kept.
        resize: images may have any size and are brought to `shape` (bilinear, antialiased).

    Returns:
        training images uint8 (n, *shape), labels int64 (n,), test images, labels.

    Raises:
        UserError: a file that is no image of that shape, a folder that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    listing = dict(zip(("train", "test"), (entries for _, entries in parts), strict=True))
    key = hashlib.blake2b(repr(listing).encode(), digest_size=10).hexdigest()
    cached = cache_dir / "images" / f"{dataset}-{key}.safetensors"
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        tensors = load_file(cached)
        return tensors[names[0]], tensors[names[1]], tensors[names[2]], tensors[names[3]]
    except (OSError, SafetensorError, KeyError):
        pass  # not there yet, or damaged
    train, test = (decode(dataset, shape, folder, entries, resize) for folder, entries in parts)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f".{cached.name}.{os.getpid()}")
        save_file(dict(zip(names, (*train, *test), strict=True)), partial)
        partial.replace(cached)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the decoded images to {cached.parent} ({error})",
            hint="SUBSPACE_CACHE=/some/folder or paths.cache_dir=/some/folder puts them elsewhere",
        ) from error
    return *train, *test


def class_folders(folder: Path) -> list[Entry]:
    """The images of <folder>/<class>/, in order; classes are numbered by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [
        (name, label, entry.name, entry.stat().st_size)
        for label, name in enumerate(classes)
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name)
        if entry.name.lower().endswith(_IMAGES)
    ]


def semicolon_table(folder: Path, table: Path) -> list[Entry]:
    """The images of `folder` that a table with the columns Filename and ClassId names, in its order."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    return [("", int(row["ClassId"]), row["Filename"], (folder / row["Filename"]).stat().st_size) for row in rows]


def decode(
    dataset: str, shape: tuple[int, int, int], folder: Path, entries: list[Entry], resize: bool
) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, *shape) and labels int64 (n,) of one part."""
    from PIL import Image

    images = np.empty((len(entries), *shape), dtype=np.uint8)
    for index, (name, _, file, _) in enumerate(entries):
        path = folder / name / file
        try:
            with Image.open(path) as image:
                colour = image.convert("RGB")
            if resize:
                colour = colour.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
            images[index] = np.asarray(colour).transpose(2, 0, 1)
        except (OSError, ValueError) as error:
            raise UserError(f"data={dataset}: {path} cannot be read ({error})") from error
    return torch.from_numpy(images), torch.tensor([label for _, label, _, _ in entries])
