"""Where small image sets come from, as uint8 tensors: scikit-learn's digits, MNIST and its like, CIFAR, and others."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.image_trees import Tensors, class_folders, decoded, semicolon_table
from subspace_lab.data.mini_imagenet import SHAPE, mini_imagenet
from subspace_lab.errors import UserError

Dataset = Literal[
    "digits",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "notmnist",
    "usps",
    "cifar10",
    "cifar100",
    "gtsrb",
    "svhn",
    "mini_imagenet",
]
DIGITS_TEST = 360


@dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read.

    Attributes:
        shape: (channels, height, width).
        classes: how many.
        white: the largest pixel value.
    """

    shape: tuple[int, int, int]
    classes: int = 10
    white: int = 255


KINDS = {
    "digits": Kind((1, 8, 8), white=16),
    "mnist": Kind((1, 28, 28)),
    "fashion_mnist": Kind((1, 28, 28)),
    "kmnist": Kind((1, 28, 28)),
    "notmnist": Kind((1, 28, 28)),
    "usps": Kind((1, 16, 16)),
    "cifar10": Kind((3, 32, 32)),
    "cifar100": Kind((3, 32, 32), classes=100),
    "gtsrb": Kind((3, 32, 32), classes=43),
    "svhn": Kind((3, 32, 32)),
    "mini_imagenet": Kind(SHAPE, classes=100),
}

_HINT = "SUBSPACE_DATA=/some/folder or data.data_dir=/some/folder says where data lies; data=digits needs none"
_IDX_PARTS = ("train", "t10k")
# Broken files of these formats end in one of these.
_UNREADABLE = (OSError, ValueError, RuntimeError, AssertionError, LookupError, EOFError)


@dataclass(frozen=True)
class ImageSet:
    """A data set as it comes.

    Attributes:
        train_images: uint8 (n, channels, height, width).
        train_labels: int64 (n,).
        test_images: uint8 (m, channels, height, width).
        test_labels: int64 (m,).
        identity: hash of the four.
        note: what is unusual about them; empty if nothing is.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    identity: str
    note: str = ""


@lru_cache(maxsize=2)
def load(dataset: str, data_dir: Path, cache_dir: Path) -> ImageSet:
    """Return a data set; the runs of one process share it.

    Args:
        dataset: a key of `KINDS`.
        data_dir: where data lies; MNIST and its like, USPS and SVHN are downloaded to it where they are absent.
        cache_dir: where decoded images are kept.

    Raises:
        UserError: nothing there and no network, files that cannot be read, a folder that cannot be written.
    """
    note = ""
    if dataset == "digits":
        parts = digits()
    elif dataset in ("cifar10", "cifar100"):
        parts = _cifar(dataset, data_dir, cache_dir)
    elif dataset == "gtsrb":
        parts = _gtsrb(data_dir, cache_dir)
    elif dataset == "svhn":
        parts = _svhn(data_dir)
    elif dataset == "usps":
        parts = _usps(data_dir)
    elif dataset == "mini_imagenet":
        parts, note = mini_imagenet(data_dir / dataset, cache_dir, _HINT)
    else:
        parts, note = _idx(dataset, data_dir)
    kind = KINDS[dataset]
    for images, labels in (parts[:2], parts[2:]):
        if images.shape[1:] != kind.shape or len(images) != len(labels) or not len(labels):
            raise UserError(
                f"data={dataset}: {tuple(images.shape)} pixels, {len(labels)} labels; expected {kind.shape} each"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= kind.classes:
            raise UserError(
                f"data={dataset}: labels {int(labels.min())} … {int(labels.max())}, expected 0 … {kind.classes - 1}"
            )
    digest = hashlib.blake2b(digest_size=16)
    for tensor in parts:
        digest.update(tensor.numpy().data)
    return ImageSet(*parts, digest.hexdigest(), note)


def digits() -> Tensors:
    """1437 training and 360 test images of 8×8 pixels, values 0 … 16, by scikit-learn's stratified split 0."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    images = torch.from_numpy(pixels.astype(np.uint8).reshape(-1, 1, 8, 8))
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)
    targets = torch.from_numpy(labels)
    return images[train], targets[train], images[test], targets[test]


def _idx(dataset: str, data_dir: Path) -> tuple[Tensors, str]:
    """The four IDX files; of a set whose training files nobody has, its test files, cut in two."""
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    kinds = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
    kind = kinds.get(dataset)
    folder = data_dir / dataset
    raw = folder / kind.__name__ / "raw" if kind else folder / "raw"

    def files(part: str) -> tuple[Path, Path]:
        return raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"

    there = {part: all(path.is_file() for path in files(part)) for part in _IDX_PARTS}
    halved = dataset in ("kmnist", "notmnist") and there["t10k"] and not there["train"]
    if not all(there.values()) and not halved:
        if kind is None:
            missing = ", ".join(path.name for part in _IDX_PARTS for path in files(part))
            raise UserError(f"data={dataset}: {missing} are not all in {raw}", hint=_HINT)
        _download(kind, kind.mirrors[0], folder, dataset, raw)
    try:
        parts = [
            (read_image_file(str(images))[:, None], read_label_file(str(labels)))
            for images, labels in (files(part) for part in _IDX_PARTS if not halved or part == "t10k")
        ]
    except _UNREADABLE as error:
        raise UserError(f"data={dataset}: the files in {raw} cannot be read ({error})", hint=_HINT) from error
    if not halved:
        return (*parts[0], *parts[1]), ""
    images, labels = parts[0]
    cut = len(labels) * 4 // 5
    note = f"the test part alone: its first {cut} images train, its last {len(labels) - cut} test, in file order"
    return (images[:cut], labels[:cut], images[cut:], labels[cut:]), note


def _usps(data_dir: Path) -> Tensors:
    from torchvision.datasets import USPS

    folder = data_dir / "usps"
    if not all((folder / name).is_file() for _, name, _ in USPS.split_list.values()):
        _download(USPS, USPS.split_list["train"][0], folder, "usps", folder)
    found: list[Tensor] = []
    try:
        for part in (True, False):
            images = USPS(folder, train=part)
            found += [torch.from_numpy(images.data)[:, None], torch.tensor(images.targets)]
    except _UNREADABLE as error:
        raise UserError(f"data=usps: the files in {folder} cannot be read ({error})", hint=_HINT) from error
    return found[0], found[1], found[2], found[3]


def _svhn(data_dir: Path) -> Tensors:
    """The cropped digits, MATLAB files of images (32, 32, 3, n) and labels (n, 1), where 10 is the digit 0."""
    from scipy.io import loadmat  # type: ignore[import-untyped]
    from torchvision.datasets import SVHN

    folder = data_dir / "svhn"
    paths = [folder / SVHN.split_list[part][1] for part in ("train", "test")]
    if not all(path.is_file() for path in paths):
        _download(SVHN, SVHN.split_list["train"][0], folder, "svhn", folder, parts=("train", "test"))
    found: list[Tensor] = []
    try:
        for path in paths:
            content = loadmat(str(path))
            labels = torch.from_numpy(content["y"].astype(np.int64).flatten())
            found += [torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous(), labels % 10]
    except (*_UNREADABLE, TypeError, zlib.error) as error:
        raise UserError(f"data=svhn: the files in {folder} cannot be read ({error})", hint=_HINT) from error
    return found[0], found[1], found[2], found[3]


def _download(
    kind: Any, url: str, folder: Path, dataset: str, where: Path, parts: tuple[str, ...] | None = None
) -> None:
    from filelock import FileLock

    try:
        require_network(url)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            for chosen in [{"train": True}, {"train": False}] if parts is None else [{"split": part} for part in parts]:
                kind(folder, **chosen, download=True)
    except (OSError, RuntimeError) as error:
        raise hub_error(f"data={dataset}: no {kind.__name__} files in {where}", url, error, _HINT) from error


def _cifar(dataset: str, data_dir: Path, cache_dir: Path) -> Tensors:
    """The original python batches where they are, else a tree {train,test}/<class>/ of images."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR100 if dataset == "cifar100" else CIFAR10
    folder = data_dir / dataset
    for root in (folder, data_dir):
        if (root / kind.base_folder).is_dir():
            return _batches(kind, dataset, root)
    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        parts = [(part, class_folders(part)) for part in (train, test)]
        return decoded(dataset, KINDS[dataset].shape, parts, cache_dir)
    raise UserError(
        f"data={dataset}: neither {folder}/{kind.base_folder} nor {folder}/train and {folder}/test is there", hint=_HINT
    )


def _batches(kind: Any, dataset: str, root: Path) -> Tensors:
    found: list[Tensor] = []
    try:
        for part in (True, False):
            images = kind(root, train=part)
            found += [torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)]
    except _UNREADABLE as error:
        raise UserError(f"data={dataset}: {root}/{kind.base_folder} cannot be read ({error})", hint=_HINT) from error
    return found[0], found[1], found[2], found[3]


def _gtsrb(data_dir: Path, cache_dir: Path) -> Tensors:
    """Torchvision's layout: traffic signs of any size, brought to 32×32."""
    folder = data_dir / "gtsrb"
    train, test = folder / "GTSRB" / "Training", folder / "GTSRB" / "Final_Test" / "Images"
    table = folder / "GT-final_test.csv"
    if not (train.is_dir() and test.is_dir() and table.is_file()):
        raise UserError(f"data=gtsrb: {train}, {test} and {table} are not all there", hint=_HINT)
    try:
        parts = [(train, class_folders(train)), (test, semicolon_table(test, table))]
    except _UNREADABLE as error:
        raise UserError(f"data=gtsrb: {table} and its images cannot be read ({error})", hint=_HINT) from error
    return decoded("gtsrb", KINDS["gtsrb"].shape, parts, cache_dir, resize=True)
