"""Where the tensors of a base and of T models come from, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Entries."""
        count = 1
        for n in self.shape:
            count *= n
        return count


class Sources(ABC):
    """A base and T models that have the same tensors (see `subspace_lab.merging.checking`).

    Attributes:
        labels: of the models, for messages.
        device: where reads are put.
    """

    labels: Sequence[str]
    device: torch.device

    @property
    def models(self) -> int:
        """T."""
        return len(self.labels)

    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """The base's tensors, by name, in the order in which they are best read."""

    @abstractmethod
    def read(self, model: int | None, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries start … stop of one tensor, flat, of model t (from 0) or of the base (None).

        Returns:
            As stored, not to be written to, possibly a view of a file's pages; on `device`.
        """

    def release(self) -> None:  # noqa: B027 - tensors in memory stay there
        """What was read will hardly be looked at again: a file's pages may leave memory.  Views stay valid."""

    def close(self) -> None:  # noqa: B027 - tensors in memory have nothing to close
        """Nothing will be read any more."""


class StateDicts(Sources):
    """Tensors in memory.

    Args:
        base: name -> tensor.
        models: T of the same.
        labels: of the models; default: 1, 2, ….
        device: where reads are put; default: where they are.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        models: Sequence[Mapping[str, Tensor]],
        labels: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._base, self._models = base, models
        self.labels = labels if labels is not None else [str(t + 1) for t in range(len(models))]
        first = next(iter(base.values()), torch.zeros(()))
        self.device = first.device if device is None else torch.device(device)

    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._base.items()}

    @override
    def read(self, model: int | None, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        state = self._base if model is None else self._models[model]
        return state[name].detach().reshape(-1)[start:stop].to(self.device)
