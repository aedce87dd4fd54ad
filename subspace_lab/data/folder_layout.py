"""`Layout`: which parts a folder of images has and which classes, however it is laid out."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from subspace_lab.data.image_listing import Listing, class_names, listing
from subspace_lab.errors import UserError

_VALIDATION = ("val", "valid", "validation")
_PARTS = ("train", "test", *_VALIDATION)


class Layout:
    """Images in one of three layouts: the first that is there.

    * {train, val, test}/<class>/…, val by any of its names; a folder without class folders counts as absent.
    * lists beside the folder, <folder>_train.txt and <folder>_test.txt, of lines `path label` (DomainNet's): paths
      from where the lists lie, labels from 0, and the name of the folder that an image is in is its class's.
    * <class>/… alone: one part, called train.

    Args:
        root: the folder.
        dataset: its name, for messages.
        cache_dir: where listings are kept.
    """

    def __init__(self, root: Path, dataset: str, cache_dir: Path) -> None:
        self.root, self._dataset, self._cache_dir = root, dataset, cache_dir

    def _list_file(self, part: str) -> Path:
        return self.root.with_name(f"{self.root.name}_{part}.txt")

    @functools.cached_property
    def _listed(self) -> dict[str, Listing]:
        if class_names(self.root / "train") or not self._list_file("train").is_file():
            return {}
        files = {part: self._list_file(part) for part in ("train", "test")}
        return _read_lists({part: file for part, file in files.items() if file.is_file()})

    @functools.cached_property
    def _flat(self) -> bool:
        return not self._listed and not any((self.root / part).is_dir() for part in _PARTS)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all classes, by the training part.

        Raises:
            UserError: fewer than two.
        """
        if self._listed:
            return self._listed["train"].names
        names = class_names(self.root if self._flat else self.root / "train")
        if len(names) < 2:
            found = f"{len(names)} class folders" if (self.root / "train").is_dir() else "no such folder"
            raise UserError(
                f"data={self._dataset}: {self.root / 'train'}: {found}; expected train/<class>/… with images",
                hint="data.root=/some/folder, or SUBSPACE_DATA=/some/folder with it inside",
            )
        return names

    @property
    def validation(self) -> str | None:
        """Name of the validation part, if there is one."""
        if self._listed or self._flat:
            return None
        return next((name for name in _VALIDATION if class_names(self.root / name)), None)

    @property
    def has_test(self) -> bool:
        """Whether there is a test part."""
        return "test" in self._listed or (not self._flat and bool(class_names(self.root / "test")))

    def listing(self, part: str) -> Listing:
        """The images of a part.

        Raises:
            UserError: a class that the training part has not.
        """
        if self._listed:
            return self._listed[part]
        listed = listing(self.root if self._flat else self.root / part, self._cache_dir)
        unknown = sorted(set(listed.names) - set(self.names))
        if unknown:
            raise UserError(
                f"data={self._dataset}: class folder {listed.folder / unknown[0]} has no counterpart in "
                f"{self.root / 'train'}" + (f", nor have {len(unknown) - 1} others" if unknown[1:] else ""),
                hint="every class must be in train",
            )
        return listed


def _read_lists(files: dict[str, Path]) -> dict[str, Listing]:
    """Listings of lines `path label`; sizes of files are not looked up and stand as 0."""
    rows: dict[str, tuple[list[str], list[int]]] = {}
    names: dict[int, str] = {}
    for part, file in files.items():
        paths, labels = [], []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isdigit():
                raise UserError(f"{file}, line {number}: expected 'path label', not {line.strip()[:80]!r}")
            paths.append(path)
            labels.append(int(label))
            name = os.path.basename(os.path.dirname(path))
            if names.setdefault(int(label), name) != name:
                raise UserError(
                    f"{file}, line {number}: label {label} is '{name}' here and '{names[int(label)]}' before"
                )
        rows[part] = paths, labels
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        gap = next(number for number in range(len(names) + 1) if number not in names)
        raise UserError(f"{files['train']}: labels must be 0, 1, 2, …; no image has label {gap}")
    ordered = tuple(names[label] for label in sorted(names))
    found = {}
    for part, (paths, labels) in rows.items():
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum(np.asarray([len(path) for path in encoded], dtype=np.int64))
        text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        sizes = np.zeros(len(paths), np.int64)
        found[part] = Listing(files[part].parent, ordered, np.asarray(labels, np.int64), sizes, text, ends)
    return found
