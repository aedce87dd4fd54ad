"""`Listing`: which images lie below a folder of class folders, read once and kept in the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from subspace_lab.data.splits import Indices
from subspace_lab.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of <folder>/<class>/…, by class name and then by path.

    Paths are bytes of one array: a million Python strings would take more memory, and once per worker process.

    Attributes:
        folder: what `path` starts with.
        names: of the class folders, sorted.
        labels: int64 (n,), index into `names`.
        sizes: int64 (n,), bytes of each file.
        text: uint8, the paths below `folder` one after another.
        ends: int64 (n,), where each of them ends in `text`.
    """

    folder: Path
    names: tuple[str, ...]
    labels: Indices
    sizes: Indices
    text: npt.NDArray[np.uint8]
    ends: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> str:
        """Where image `row` lies."""
        start = int(self.ends[row - 1]) if row else 0
        return os.path.join(self.folder, os.fsdecode(self.text[start : int(self.ends[row])].tobytes()))

    def identity(self) -> str:
        """Hash of names, classes and sizes: of what lies there, as far as that is told without reading it."""
        digest = hashlib.blake2b(repr(self.names).encode("utf-8", "surrogateescape"), digest_size=16)
        arrays: tuple[npt.NDArray[np.uint8] | Indices, ...] = (self.text, self.ends, self.labels, self.sizes)
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted; those that begin with a dot are none."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    except FileNotFoundError:
        return ()


def listing(folder: Path, cache_dir: Path) -> Listing:
    """Return the listing of `folder`, from the cache if no folder below it has changed since.

    A file that was overwritten in place with another image is not noticed: that would take a look at every file.

    Raises:
        UserError: no class folder, or one without any image.
    """
    key = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=10).hexdigest()
    cached = cache_dir / "image_folder" / f"{key}.npz"
    found = _read(cached, folder)
    if found is not None:
        return found
    names = class_names(folder)
    if not names:
        raise UserError(f"{folder} has no class folders", hint="one folder of images for each class")
    labels: list[int] = []
    sizes: list[int] = []
    paths: list[bytes] = []
    folders = [""]
    for label, name in enumerate(names):
        before = len(paths)
        for path, size in _images(folder, name, folders):
            labels.append(label)
            sizes.append(size)
            paths.append(path)
        if len(paths) == before:
            raise UserError(f"class folder {folder / name} has no images", hint=f"expected {', '.join(SUFFIXES)}")
    ends = np.cumsum(np.asarray([len(path) for path in paths], dtype=np.int64))
    text = np.frombuffer(b"".join(paths), dtype=np.uint8)
    whole = Listing(folder, names, np.asarray(labels, np.int64), np.asarray(sizes, np.int64), text, ends)
    _write(cached, whole, folders)
    return whole


def _images(root: Path, below: str, folders: list[str]) -> Iterator[tuple[bytes, int]]:
    """(path below root, bytes) of the images in root/below and deeper, in order; notes every folder it visits."""
    folders.append(below)
    with os.scandir(root / below) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        path = f"{below}/{entry.name}"
        if entry.is_dir():
            yield from _images(root, path, folders)
        elif entry.name.lower().endswith(SUFFIXES):
            yield os.fsencode(path), entry.stat().st_size


def _times(root: Path, folders: list[str]) -> list[int]:
    return [(root / name).stat().st_mtime_ns for name in folders]


def _read(cached: Path, folder: Path) -> Listing | None:
    try:
        with np.load(cached, allow_pickle=False) as file:
            folders = [os.fsdecode(name) for name in file["folders"].tobytes().split(b"\0")]
            if _times(folder, folders) != file["times"].tolist():
                return None
            names = tuple(os.fsdecode(name) for name in file["names"].tobytes().split(b"\0"))
            return Listing(folder, names, file["labels"], file["sizes"], file["text"], file["ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there yet, damaged, or a folder is gone


def _write(cached: Path, whole: Listing, folders: list[str]) -> None:
    def joined(names: list[str]) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)

    partial = cached.with_name(f".{cached.name}.{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(
                file,
                folders=joined(folders),
                times=np.asarray(_times(whole.folder, folders), np.int64),
                names=joined(list(whole.names)),
                labels=whole.labels,
                sizes=whole.sizes,
                text=whole.text,
                ends=whole.ends,
            )
        partial.replace(cached)
    except OSError as error:  # the images can be read all the same; only the next run must list them again
        log.warning("The list of the images in %s cannot be kept in %s (%s).", whole.folder, cached.parent, error)
