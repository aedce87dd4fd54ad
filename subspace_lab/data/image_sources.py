"""Where small image sets come from, as uint8 tensors: scikit-learn's digits, MNIST and its like, CIFAR-10."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.errors import UserError

Dataset = Literal["digits", "mnist", "fashion_mnist", "cifar10"]
CLASSES = 10  # all of them have ten
DIGITS_TEST = 360
SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}
WHITE = {"digits": 16}
"""The largest pixel value where it is not 255."""

_HINT = "SUBSPACE_DATA=/some/folder or data.data_dir=/some/folder says where data lies; data=digits needs none"
_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageSet:
    """A data set as it comes.

    Attributes:
        train_images: uint8 (n, channels, height, width).
        train_labels: int64 (n,).
        test_images: uint8 (m, channels, height, width).
        test_labels: int64 (m,).
        identity: hash of the four.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    identity: str


@lru_cache(maxsize=2)
def load(dataset: str, data_dir: Path, cache_dir: Path) -> ImageSet:
    """Return a data set; the runs of one process share it.

    Args:
        dataset: a key of `SHAPES`.
        data_dir: where data lies; MNIST and its like are downloaded to it where they are absent.
        cache_dir: where decoded images are kept.

    Raises:
        UserError: nothing there and no network, files that cannot be read, a folder that cannot be written.
    """
    if dataset == "digits":
        parts = _digits()
    elif dataset == "cifar10":
        parts = _cifar10(data_dir, cache_dir)
    else:
        parts = _idx(dataset, data_dir)
    for images, labels in (parts[:2], parts[2:]):
        if images.shape[1:] != SHAPES[dataset] or len(images) != len(labels) or not len(labels):
            raise UserError(
                f"data={dataset}: {tuple(images.shape)} pixels, {len(labels)} labels; expected {SHAPES[dataset]} each"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= CLASSES:
            raise UserError(f"data={dataset}: labels {int(labels.min())} … {int(labels.max())}, expected 0 … 9")
    digest = hashlib.blake2b(digest_size=16)
    for tensor in parts:
        digest.update(tensor.numpy().data)
    return ImageSet(*parts, digest.hexdigest())


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _digits() -> Tensors:
    """1437 training and 360 test images of 8×8 pixels, values 0 … 16, by scikit-learn's stratified split 0."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    images = torch.from_numpy(pixels.astype(np.uint8).reshape(-1, 1, 8, 8))
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)
    targets = torch.from_numpy(labels)
    return images[train], targets[train], images[test], targets[test]


def _idx(dataset: str, data_dir: Path) -> Tensors:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[dataset]
    folder = data_dir / dataset
    raw = folder / kind.__name__ / "raw"
    if not all((raw / name).is_file() for name in _IDX_FILES):
        _download(kind, folder, dataset, raw)
    try:
        train, test = (kind(folder, train=part) for part in (True, False))
    except (OSError, ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise UserError(f"data={dataset}: the files in {raw} cannot be read ({error})", hint=_HINT) from error
    return train.data[:, None], train.targets, test.data[:, None], test.targets


def _download(kind: Any, folder: Path, dataset: str, raw: Path) -> None:
    from filelock import FileLock

    try:
        require_network(kind.mirrors[0])
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            kind(folder, download=True)
    except (OSError, RuntimeError) as error:
        tried = f"data={dataset}: no {kind.__name__} files in {raw}"
        raise hub_error(tried, kind.mirrors[0], error, _HINT) from error


def _cifar10(data_dir: Path, cache_dir: Path) -> Tensors:
    """The original python batches where they are, else a tree {train,test}/<class>/ of images."""
    folder = data_dir / "cifar10"
    for root in (folder, data_dir):
        if (root / "cifar-10-batches-py").is_dir():
            return _batches(root)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _tree(folder, cache_dir)
    raise UserError(
        f"data=cifar10: neither {folder}/cifar-10-batches-py nor {folder}/train and {folder}/test is there", hint=_HINT
    )


def _batches(root: Path) -> Tensors:
    from torchvision.datasets import CIFAR10

    found: list[Tensor] = []
    try:
        for part in (True, False):
            images = CIFAR10(root, train=part)
            found += [torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"data=cifar10: {root}/cifar-10-batches-py cannot be read ({error})", hint=_HINT) from error
    return found[0], found[1], found[2], found[3]


def _tree(folder: Path, cache_dir: Path) -> Tensors:
    """Images below {train,test}/<class>/, decoded once: minutes of JPEG for one file of bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    listing = {part: _listing(folder / part) for part in ("train", "test")}
    key = hashlib.blake2b(repr(listing).encode(), digest_size=10).hexdigest()
    cached = cache_dir / "images" / f"cifar10-{key}.safetensors"
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        tensors = load_file(cached)
        return tensors[names[0]], tensors[names[1]], tensors[names[2]], tensors[names[3]]
    except (OSError, SafetensorError, KeyError):
        pass  # not there yet, or damaged
    train, test = (_decode(folder / part, listing[part]) for part in ("train", "test"))
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


def _listing(folder: Path) -> list[tuple[str, int, str, int]]:
    """(class name, label, file name, bytes) of every image, in order; classes are numbered by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [
        (name, label, entry.name, entry.stat().st_size)
        for label, name in enumerate(classes)
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name)
        if entry.name.lower().endswith(_IMAGES)
    ]


def _decode(folder: Path, listing: list[tuple[str, int, str, int]]) -> tuple[Tensor, Tensor]:
    from PIL import Image

    shape = SHAPES["cifar10"]
    images = np.empty((len(listing), *shape), dtype=np.uint8)
    for index, (name, _, file, _) in enumerate(listing):
        try:
            with Image.open(folder / name / file) as image:
                pixels = np.asarray(image.convert("RGB"))
            images[index] = pixels.transpose(2, 0, 1)
        except (OSError, ValueError) as error:
            raise UserError(f"data=cifar10: {folder / name / file} cannot be read ({error})") from error
    return torch.from_numpy(images), torch.tensor([label for _, label, _, _ in listing])
