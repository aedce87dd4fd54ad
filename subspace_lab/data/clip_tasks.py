"""Image sets from the Hugging Face hub as tasks of CLIP models that others have fine-tuned: nothing is trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.data.clip_catalog import SETS, ClipSet
from subspace_lab.data.hub_rows import hub_rows
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices, fixed_order, stratified
from subspace_lab.data.supervised import Parts, default_data_dir
from subspace_lab.data.task_suite import SuiteTask, TaskData, TaskSuite, rows_of
from subspace_lab.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.merging.settings import MergeSettings

State = dict[str, Tensor]

# Of CLIP's training images, in units of white.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FOLDER = "clip_tasks"


class HubImages:
    """Images of one split, decoded when they are asked for, as CLIP wants them.

    Args:
        rows: of the hub's data set.
        columns: of the image and of the label.
        side: of the square that is cut out, in pixels.
    """

    def __init__(self, rows: Any, columns: tuple[str, str], side: int) -> None:
        self._rows, self._columns, self._side = rows, columns, side

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Indices:
        """Labels int64 (n,); no image is decoded."""
        column = self._columns[1]
        return np.asarray(self._rows.select_columns([column])[:][column]).astype(np.int64)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` (b,): inputs float32 (b, 3, side, side)."""
        image, label = self._columns
        found = [self._rows[int(index)] for index in indices]
        return {
            "inputs": torch.stack([presented(row[image], self._side) for row in found]),
            "labels": torch.tensor([int(row[label]) for row in found]),
        }

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`: nothing is augmented."""
        return self.batch(indices)

    def identity(self) -> str:
        """The hub library's fingerprint of the rows."""
        return str(self._rows._fingerprint)

    def select(self, indices: Indices) -> HubImages:
        """Some of them."""
        return HubImages(self._rows.select(indices), self._columns, self._side)


def presented(image: Any, side: int) -> Tensor:
    """A PIL image as CLIP's own transform gives it: short side to `side` (bicubic), the middle cut out, normalised.

    Returns:
        float32 (3, side, side).
    """
    from PIL import Image

    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    # The long side is cut off to an integer, as torchvision and transformers do.
    size = (side * width // short, side * height // short)
    if size != (width, height):
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    values = (pixels / 255 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


class ClipTasks(TaskSuite):
    """Several image sets, each with a zero-shot head and a vision tower that was fine-tuned on it (`merge.models`).

    Args:
        tasks: keys of `SETS`, in the order in which models are merged.
        side: of the images that the model wants.
        validation: images of each training split to choose λ by. The published towers were fine-tuned on them.
        test: images of each test split to report, at most; null: all.
        workers: processes that decode images.
        data_dir: where `clip_tasks/<task>/<split>` may lie; null is SUBSPACE_DATA, else ./data.

    Raises:
        UserError: no such task, one twice, numbers out of range.
    """

    has_own_models = True

    def __init__(
        self,
        tasks: Sequence[str],
        dataset: str = "clip_tasks",
        side: int = 224,
        validation: int = 1000,
        test: int | None = None,
        workers: int = 4,
        data_dir: str | None = None,
    ) -> None:
        super().__init__(dataset, 1)
        for task in tasks:
            if task not in SETS:
                raise UserError(
                    f"data.tasks: no task '{task}'", hint=did_you_mean(task, SETS) or f"there are: {', '.join(SETS)}"
                )
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"data.tasks={list(tasks)}: expected some tasks, each once")
        for option, value in {"side": side, "validation": validation, "test": 1 if test is None else test}.items():
            if value < 1:
                raise UserError(f"data.{option}={value}: expected a positive number")
        if workers < 0:
            raise UserError(f"data.workers={workers}: expected 0 or more")
        self._tasks, self._validation, self._test, self._workers = list(tasks), validation, test, workers
        self.shape = (3, side, side)
        self._folder = default_data_dir(data_dir) / FOLDER

    @property
    @override
    def names(self) -> list[str]:
        return list(self._tasks)

    @override
    def _make(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        return None, [self._task(name, SETS[name]) for name in self._tasks]

    def _task(self, name: str, clip_set: ClipSet) -> SuiteTask:
        columns, classes = (clip_set.image, clip_set.label), len(clip_set.classes(name))
        train, test = (
            HubImages(hub_rows(name, self._folder, clip_set.hub, clip_set.config, split), columns, self.shape[1])
            for split in (clip_set.train, clip_set.test)
        )
        for part in (train, test):
            labels = part.labels()
            if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
                raise UserError(f"data.tasks: {name} has labels outside of its {classes} classes, or no images")
        if self._test is not None and self._test < len(test):
            test = test.select(np.sort(fixed_order(len(test), f"{name}/test")[: self._test]))
        held_out = stratified(train.labels(), min(self._validation, len(train) // 2), f"{name}/validation")
        return SuiteTask(name, classes, Parts(train.select(rows_of(~held_out)), train.select(rows_of(held_out)), test))

    @override
    def tasks(self) -> list[TaskData]:
        found = super().tasks()
        for one in found:
            one.num_workers = self._workers
        return found

    def load(
        self, cfg: DictConfig, settings: MergeSettings, device: torch.device
    ) -> tuple[nn.Module, State, list[State], list[nn.Module]]:
        """The encoder, the base's vision tower, one for each task, and the zero-shot heads.

        Raises:
            UserError: a model that is no CLIP, no `merge.models`, or one that cannot be read.
        """
        from subspace_lab import build
        from subspace_lab.models.clip import TOWER, ClipImageEncoder, ZeroShot, read_tower

        model = build.build_model_for(cfg, {"data_shape": self.shape, "data_classes": self.made[1][0].classes})
        if not isinstance(model, ClipImageEncoder):
            raise UserError(
                f"data={self.dataset} are for CLIP models", hint="model=clip_vit_b32, clip_vit_b16, clip_vit_l14"
            )
        if model.side != self.shape[1]:
            raise UserError(f"data.side={self.shape[1]}: {model.path} wants images of {model.side}×{model.side} pixels")
        if settings.models is None:
            raise UserError(
                f"data={self.dataset} needs a fine-tuned vision tower for each task (merge.models)",
                hint="experiment=merge_clip_vit_b32_8 names them; or merge.models={sun397: /a/folder, …}",
            )
        model = model.eval().requires_grad_(False)
        base = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TOWER)}
        if settings.base is not None and settings.base != model.path:
            base = read_tower(settings.base, "merge.base", model)
            model.load_state_dict(base, strict=False)
        models = [read_tower(settings.models[name], f"merge.models.{name}", model) for name in self._tasks]
        zero_shot = ZeroShot(model.path, device)
        heads: list[nn.Module] = [zero_shot.head(SETS[name].classes(name), SETS[name].prompts) for name in self._tasks]
        return model, {name: tensor.clone() for name, tensor in base.items()}, models, heads
