"""Views of scikit-learn's digits as tasks of a suite: turned, mirrored, inverted, patches in another order, noisy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.data.image_sources import KINDS, digits
from subspace_lab.data.splits import fixed_order
from subspace_lab.data.supervised import Parts
from subspace_lab.data.task_suite import HeldExamples, SuiteTask, TaskSuite, unique
from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.linalg.random import derive_key, uniform

_MEAN, _STD = 0.305, 0.376  # of all 1797 images, in units of white
_SIDE, _PATCH = 8, 2
_CLASSES = 10

View = Callable[[Tensor], Tensor]


def _patches(images: Tensor) -> Tensor:
    """Patches of 2×2 pixels in one other order."""
    order = torch.from_numpy(fixed_order((_SIDE // _PATCH) ** 2, "digits_tasks/patches"))
    unfolded = torch.nn.functional.unfold(images, _PATCH, stride=_PATCH)
    return torch.nn.functional.fold(unfolded[:, :, order], (_SIDE, _SIDE), _PATCH, stride=_PATCH)


#: (n, 1, 8, 8) with white 1 and black 0 to the same
VIEWS: dict[str, View] = {
    "upright": lambda images: images,
    "rot90": lambda images: images.rot90(1, (2, 3)),
    "rot180": lambda images: images.rot90(2, (2, 3)),
    "rot270": lambda images: images.rot90(3, (2, 3)),
    "hflip": lambda images: images.flip(3),
    "vflip": lambda images: images.flip(2),
    "transpose": lambda images: images.transpose(2, 3),
    "antitranspose": lambda images: images.rot90(2, (2, 3)).transpose(2, 3),
    "invert": lambda images: 1 - images,
    "patches": _patches,
}
_DIHEDRAL = ("upright", "rot90", "rot180", "rot270", "hflip", "vflip", "transpose", "antitranspose")


class DigitsTasks(TaskSuite):
    """The 1797 digits, divided once, the same for every task and in every run.

    The encoder is pretrained on few images in all eight orientations, as they are and inverted; each expert on more
    images in one view.

    Args:
        views: a task each, see `VIEWS`; `noise` adds Gaussian-like noise. One that comes twice is two tasks.
        batch_size: images per step.
        pretrain: images the encoder is pretrained on; 0: none, experts start from weights of their own.
        train: images of an expert.
        validation: images by which λ is chosen.
        noise: its standard deviation, in units of white.
        noise_draws: how often each training image comes with other noise.
        shared_head: all tasks have the head of the first, instead of one each.

    Raises:
        UserError: no such view, more images than there are, a part without any.
    """

    shape = (1, _SIDE, _SIDE)

    def __init__(
        self,
        views: Sequence[str] = ("rot90", "rot180", "rot270", "hflip", "vflip", "transpose", "invert", "patches"),
        batch_size: int = 64,
        pretrain: int = 250,
        train: int = 650,
        validation: int = 180,
        noise: float = 0.5,
        noise_draws: int = 4,
        shared_head: bool = False,
        dataset: str = "digits_tasks",
    ) -> None:
        super().__init__(dataset, batch_size)
        for view in views:
            if view not in VIEWS and view != "noise":
                hint = did_you_mean(view, [*VIEWS, "noise"]) or f"one of {', '.join([*VIEWS, 'noise'])}"
                raise UserError(f"data.views: no view {view!r}", hint=hint)
        if not views:
            raise UserError("data.views is empty: expected at least one task")
        for name, value, least in (("pretrain", pretrain, 0), ("train", train, 1), ("validation", validation, 1)):
            if value < least:
                raise UserError(f"data.{name}={value}: expected at least {least}")
        if noise < 0 or noise_draws < 1:
            raise UserError(f"data.noise={noise}, data.noise_draws={noise_draws}: expected 0 or more, 1 or more")
        self._views, self._sizes = list(views), (pretrain, train, validation)
        self._noise, self._noise_draws, self.shared_head = noise, noise_draws, shared_head

    @property
    @override
    def names(self) -> list[str]:
        return unique(self._views)

    @property
    @override
    def has_base(self) -> bool:
        return self._sizes[0] > 0

    @override
    def _make(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        first, first_labels, second, second_labels = digits()
        images = torch.cat([first, second]).float() / KINDS["digits"].white
        labels = torch.cat([first_labels, second_labels])
        order = torch.from_numpy(fixed_order(len(labels), "digits_tasks"))
        pretrain, train, validation = self._sizes
        if sum(self._sizes) >= len(labels):
            raise UserError(
                f"data.pretrain={pretrain}, train={train}, validation={validation}: {len(labels)} images in all, and "
                "some are needed to test"
            )
        cuts = order.tensor_split(torch.tensor([pretrain, pretrain + train, pretrain + train + validation]))

        def shown(rows: Tensor, view: str, draws: int = 1) -> HeldExamples:
            if view == "noise":
                many = rows.repeat(draws)
                seen = images[many] + self._noise * _noise_like(images[many], f"{int(rows[0])}/{draws}")
                return HeldExamples((seen - _MEAN) / _STD, labels[many])
            return HeldExamples(((VIEWS[view](images[rows]) - _MEAN) / _STD).contiguous(), labels[rows])

        tasks = [
            SuiteTask(
                name,
                _CLASSES,
                Parts(shown(cuts[1], view, self._noise_draws), shown(cuts[2], view), shown(cuts[3], view)),
            )
            for name, view in zip(self.names, self._views, strict=True)
        ]
        if not pretrain:
            return None, tasks
        seen = self._all_orientations(images[cuts[0]], labels[cuts[0]])
        # How well pretraining went is seen on the tasks; this only draws a curve.
        unseen = shown(cuts[2], "upright")
        return SuiteTask("pretraining", _CLASSES, Parts(seen, unseen, unseen)), tasks

    @staticmethod
    def _all_orientations(images: Tensor, labels: Tensor) -> HeldExamples:
        seen = [VIEWS[view](sign(images)) for view in _DIHEDRAL for sign in (VIEWS["upright"], VIEWS["invert"])]
        return HeldExamples((torch.cat(seen) - _MEAN) / _STD, labels.repeat(len(seen)))


def _noise_like(images: Tensor, purpose: str) -> Tensor:
    """Noise of mean 0 and standard deviation 1, a sum of four uniform numbers, the same everywhere."""
    key = derive_key("digits_tasks/noise", purpose)
    return (uniform((4, *images.shape), key=key).sum(0) - 2) * 3**0.5
