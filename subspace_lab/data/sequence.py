"""`DataSequence`: several image sets in a row, each a task of `scenario=domain`, together one data set to divide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from subspace_lab.data.classifying import ImageClassificationDataModule
from subspace_lab.data.documents import hash_text
from subspace_lab.data.image_folder import ImageFolderDataModule
from subspace_lab.data.image_listing import class_names
from subspace_lab.data.joined import JoinedExamples
from subspace_lab.data.presentation import Presentation
from subspace_lab.data.supervised import Parts, default_data_dir
from subspace_lab.errors import UserError

_PARTS = ("train", "validation", "test")


class DataSequence(ImageClassificationDataModule):
    """Image sets in a row.

    As one data set (`protocol=fit`, or `scenario=split` over all of them) it has the examples of all members, and
    either their common classes or the classes of each member after those of the one before.

    Args:
        dataset: its name.
        members: the sets by name, in order; all with this batch size and one shape of images. Mixing and the loss of
            the whole are the first member's.
        batch_size: images per process and step.
        shared_classes: whether class k is the same in every member; null: if their names are.
    """

    def __init__(
        self,
        dataset: str,
        members: Mapping[str, ImageClassificationDataModule],
        batch_size: int,
        shared_classes: bool | None = None,
    ) -> None:
        if not members:
            raise UserError(f"data={dataset}: a sequence of no data sets", hint="give data.members at least one")
        first = next(iter(members.values()))
        super().__init__(
            dataset,
            batch_size,
            first._val_size,
            first._train_fraction,
            first._mixup,
            first._cutmix,
            first._label_smoothing,
            first._loss,
            str(first._data_dir),
            str(first._cache_dir),
        )
        for name, member in members.items():
            for what, own, wanted in (
                ("images of shape", member.shape, first.shape),
                ("a batch size of", member.batch_size, batch_size),
            ):
                if own != wanted:
                    raise UserError(
                        f"data={dataset}: {name} has {what} {own}, others of {wanted}; expected one for all"
                    )
        self.members, self._shared = dict(members), shared_classes
        self.shape, self.num_workers = first.shape, max(member.num_workers for member in members.values())
        self.global_batch_size: int | None = getattr(first, "global_batch_size", None)

    @property
    def _first(self) -> ImageClassificationDataModule:
        return next(iter(self.members.values()))

    @functools.cached_property
    def shared_classes(self) -> bool:
        """Whether class k is the same in every member."""
        if self._shared is None:
            return len({member.class_names for member in self.members.values()}) == 1
        if self._shared and len({member.classes for member in self.members.values()}) > 1:
            counts = ", ".join(f"{name} {member.classes}" for name, member in self.members.items())
            raise UserError(
                f"data.shared_classes=true, but {self.dataset} has different numbers of classes: {counts}",
                hint="data.shared_classes=false",
            )
        return self._shared

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; where they are not shared, after the name of the member."""
        if self.shared_classes:
            return self._first.class_names
        return tuple(f"{name}/{label}" for name, member in self.members.items() for label in member.class_names)

    @property
    @override
    def classes(self) -> int:
        """How many classes the members have together."""
        counts = [member.classes for member in self.members.values()]
        return counts[0] if self.shared_classes else sum(counts)

    @property
    @override
    def presentation(self) -> Presentation:
        """How a model of the first member wants its images."""
        return self._first.presentation

    @override
    def examples_as(self, presentation: Presentation) -> Parts:
        """All images, unaugmented, as another data set's model wants them; after `setup`."""
        return self._joined([member.examples_as(presentation) for member in self.members.values()])

    @override
    def configure(self, rank: int, world_size: int, seed: int) -> None:
        """Say which process this is and what orders the training examples; before `setup`."""
        for member in self.members.values():
            member.configure(rank, world_size, seed)
        super().configure(rank, world_size, seed)

    @override
    def _load(self) -> Parts:
        for member in self.members.values():
            member.setup()
        return self._joined([member.parts for member in self.members.values()])

    def _joined(self, parts: Sequence[Parts]) -> Parts:
        starts = np.cumsum([0, *(member.classes for member in self.members.values())])
        whole = []
        for part in _PARTS:
            renumbered = []
            for own, member, start in zip(parts, self.members.values(), starts, strict=False):
                examples: Any = getattr(own, part)
                numbers = np.arange(member.classes, dtype=np.int64) + (0 if self.shared_classes else start)
                renumbered.append(examples.chosen(np.arange(len(examples)), numbers, None))
            whole.append(JoinedExamples(renumbered))
        return Parts(*whole)

    @property
    @override
    def held_out(self) -> bool:
        """Whether no validation part is trained on; after `setup`."""
        return all(member.held_out for member in self.members.values())

    @property
    @override
    def _eval_batch_size(self) -> int:
        return self._first._eval_batch_size

    @override
    def _fingerprint(self) -> str:
        return hash_text(repr([self.parts.train.identity(), self._seed]))

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        return super().describe() | {"members": {name: member.describe() for name, member in self.members.items()}}


class FolderSequence(DataSequence):
    """Folders of images in a row, each laid out in any of the ways of `Layout`.

    Args:
        each: makes the data module of one folder, given `dataset`, `root` and `batch_size`.
        dataset: its name.
        batch_size: images per process and step.
        folders: names of folders in `root`, or paths; null: every folder in `root`, sorted.
        root: null is <data_dir>/<dataset>.
        shared_classes: as in `DataSequence`.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
    """

    def __init__(
        self,
        each: Callable[..., ImageFolderDataModule],
        dataset: str = "image_folder_sequence",
        batch_size: int = 64,
        folders: Sequence[str] | None = None,
        root: str | None = None,
        shared_classes: bool | None = None,
        data_dir: str | None = None,
    ) -> None:
        above = Path(root).expanduser() if root else default_data_dir(data_dir) / dataset
        names = class_names(above) if folders is None else tuple(folders)
        if len(set(names)) < max(1, len(names)):
            raise UserError(
                f"data={dataset}: {len(names)} folders{'' if folders else f' in {above}'}; expected each of them once",
                hint="data.folders=[a,b,c] data.root=/some/folder, or SUBSPACE_DATA=/some/folder with it inside",
            )
        paths = {Path(name).name: above / Path(name).expanduser() for name in names}
        if len(paths) < len(names):
            raise UserError(f"data.folders={list(names)}: two folders of one name", hint="rename one of them")
        members = {
            name: each(dataset=f"{dataset}/{name}", root=str(path), batch_size=batch_size)
            for name, path in paths.items()
        }
        super().__init__(dataset, members, batch_size, shared_classes)
