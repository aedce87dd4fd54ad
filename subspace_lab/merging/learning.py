"""What methods have in common that look at examples: what they learnt can be saved, loaded, and found for a stack."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import interrupt
from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.workshop import Workshop


class LearningMerge(Merge):
    """A method whose `update` needs what `learn` found; its `scale` is 1 or fixed by what was learnt."""

    needs_data: ClassVar[bool] = True
    scalable: ClassVar[bool] = False
    concurrent: ClassVar[bool] = True

    @override
    @abstractmethod
    def learn(self, workshop: Workshop) -> None:
        """Find from examples what `update` needs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """What was learnt, as tensors by name: enough for `update` without `learn`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what an equal method's `state_dict` gave."""


def stop_if_asked() -> None:
    """Between steps: go no further if a signal that only takes note (preemption) has arrived.

    Raises:
        KeyboardInterrupt: one has.
    """
    if interrupt.requested() is not None:
        raise KeyboardInterrupt


def draw_seed(workshop: Workshop, use: str, task: int) -> int:
    """A seed in [0, 2^31) for the batches of one task."""
    return derive_key(f"{use}/1", workshop.seed, task) % 2**31


def floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that can be merged: counters and masks are the base's."""
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def computing(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def source_name(name: str) -> str:
    """The tensor that a stack's entry was cut from: `<tensor>#0` is part of `<tensor>`."""
    return name.partition("#")[0]


def lookup(values: Mapping[str, Tensor], name: str) -> Tensor:
    """What was learnt for the tensor of a stack's entry.

    Raises:
        UserError: nothing was.
    """
    try:
        return values[source_name(name)]
    except KeyError:
        raise UserError(
            f"nothing was learnt for tensor {source_name(name)}: the method learnt on other models",
            hint="merge the models that it learnt on",
        ) from None


def entries(values: Mapping[str, Tensor], stack: Stack) -> Tensor:
    """The entries of per-parameter values that belong to a stack, of whole tensors, parts or flat pieces.

    Returns:
        (b, *shape)
    """
    size = math.prod(stack.shape)
    found = []
    for name in stack.names:
        part = name.partition("#")[2]
        first = int(part) * size if part else stack.start
        found.append(lookup(values, name).reshape(-1)[first : first + size].view(stack.shape))
    return torch.stack(found)


def check_positive(**values: float) -> None:
    """Raise UserError for an option that is not positive."""
    for option, value in values.items():
        if not value > 0:
            raise UserError(f"method.{option}={value}: expected a positive number")


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a state whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
