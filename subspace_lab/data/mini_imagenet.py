"""mini-ImageNet for learning in tasks: 100 classes of ImageNet, 500 training and 100 test images each, 84×84 pixels.

Vinyals et al., NeurIPS 2016, arXiv 1606.04080. Nobody may hand it out, so it is read from what people have:

* arrays: {train,test}_{x,y}.npy, as the releases of Mammoth and of federated orthogonal training read them;
* a tree {train,test}/<class>/ of images, of any size;
* what few-shot learning has: the pickles mini-imagenet-cache-{train,val,test}.pkl, folders {train,val,test}/<class>/
  of 64, 16 and 20 classes, or all <class>/ in one folder: of each class the first five sixths train, the rest test.

Classes are numbered as the arrays have it, else by name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from subspace_lab.data.image_trees import Entry, Tensors, class_folders, decoded
from subspace_lab.errors import UserError

SHAPE = (3, 84, 84)
_ARRAYS = ("train_x.npy", "train_y.npy", "test_x.npy", "test_y.npy")
_PICKLES = (("train",), ("val", "validation"), ("test",))
# All that a pickle of arrays needs; anything else could run code.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


def mini_imagenet(folder: Path, cache_dir: Path, hint: str) -> tuple[Tensors, str]:
    """Return the images, and what is unusual about them.

    Args:
        folder: see above.
        cache_dir: where decoded images are kept.
        hint: how to say where data lies.

    Returns:
        training images uint8 (n, 3, 84, 84), labels int64 (n,), test images, labels; a note.

    Raises:
        UserError: nothing of this is there, or it cannot be read.
    """
    if all((folder / name).is_file() for name in _ARRAYS):
        return _arrays(folder, hint), ""
    pickles = [next((path for path in _named(folder, names) if path.is_file()), None) for names in _PICKLES]
    if all(pickles):
        return _cut(*_pickles([path for path in pickles if path], hint))
    there = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    trees = [_relative(folder, f"{name}/") for name in there] or [_relative(folder, "")]
    if not any(trees):
        raise UserError(
            f"data=mini_imagenet: {folder} has neither {', '.join(_ARRAYS)} nor mini-imagenet-cache-*.pkl nor folders "
            "{train,test}/<class>/ of images",
            hint=hint,
        )
    return _trees(folder, trees, cache_dir)


def _named(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / f"mini-imagenet-cache-{name}.pkl" for name in names]


def _arrays(folder: Path, hint: str) -> Tensors:
    found: list[Any] = []
    for name in _ARRAYS:
        try:
            found.append(np.load(folder / name))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"data=mini_imagenet: {folder / name} cannot be read ({error})", hint=hint) from error
    train, train_labels, test, test_labels = found
    return (*_tensors(train, train_labels, folder), *_tensors(test, test_labels, folder))


def _tensors(images: Any, labels: Any, where: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 84, 84, 3) of bytes and labels (n,), as tensors (n, 3, 84, 84) and int64 (n,)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*SHAPE[1:], SHAPE[0]):
        raise UserError(
            f"data=mini_imagenet: images of {where} are {images.dtype} {images.shape}; expected uint8 (n, 84, 84, 3)"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


class _Arrays(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module_name}.{global_name}, which is no array")
        return super().find_class(module_name, global_name)


def _pickles(paths: list[Path], hint: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of few-shot learning's three files; classes are numbered by name."""
    images: list[torch.Tensor] = []
    named: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                content = _Arrays(file, encoding="latin1").load()
            pixels, classes = content["image_data"], content["class_dict"]
            start = sum(map(len, images))
            images.append(_tensors(pixels, np.zeros(len(pixels)), path)[0])
            named |= {str(name): torch.tensor(list(rows), dtype=torch.int64) + start for name, rows in classes.items()}
        except (OSError, pickle.UnpicklingError, LookupError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"data=mini_imagenet: {path} cannot be read ({error})", hint=hint) from error
    counts = [len(named[name]) for name in sorted(named)]
    rows = torch.cat([named[name] for name in sorted(named)])
    if not torch.equal(rows.sort().values, torch.arange(sum(map(len, images)))):
        raise UserError(f"data=mini_imagenet: the class_dicts of {paths[0].parent} do not name every image once")
    labels = torch.empty_like(rows)
    labels[rows] = torch.repeat_interleave(torch.tensor(counts))
    return torch.cat(images), labels


def _cut(images: torch.Tensor, labels: torch.Tensor) -> tuple[Tensors, str]:
    train = _first(labels.tolist())
    return (images[train], labels[train], images[~train], labels[~train]), _NOTE


_NOTE = "divided for few-shot learning: the first five sixths of each class train, the others test, in file order"


def _first(labels: list[int]) -> torch.Tensor:
    """Which images are among the first five sixths of their class, bool (n,)."""
    _, inverse, counts = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(place < (counts * 5 // 6)[inverse])


def _relative(folder: Path, prefix: str) -> list[Entry]:
    """The images of folder/prefix<class>/, in order, with their folders as seen from `folder`."""
    if not folder.is_dir():
        return []
    return [(prefix + name, label, file, size) for name, label, file, size in class_folders(folder / prefix)]


def _trees(folder: Path, trees: list[list[Entry]], cache_dir: Path) -> tuple[Tensors, str]:
    """Images from folders: train and test as they are if they have the same classes, else all of them cut anew."""
    classes = [{_class(entry) for entry in tree} for tree in trees]
    numbers = {name: number for number, name in enumerate(sorted(set().union(*classes)))}
    divided = len(trees) > 1 and classes[0] == classes[-1]
    parts = [trees[0], trees[-1]] if divided else [[entry for tree in trees for entry in tree]]
    parts = [[(entry[0], numbers[_class(entry)], *entry[2:]) for entry in part] for part in parts]
    note = "" if divided else _NOTE
    if not divided:
        ordered = sorted(parts[0], key=lambda entry: (entry[1], entry[2]))
        first = _first([label for _, label, _, _ in ordered]).tolist()
        parts = [[entry for entry, mine in zip(ordered, first, strict=True) if mine is part] for part in (True, False)]
    return decoded("mini_imagenet", SHAPE, [(folder, part) for part in parts], cache_dir, resize=True), note


def _class(entry: Entry) -> str:
    return entry[0].rpartition("/")[2]
