"""A model's state as one flat vector: what travels between server and clients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Layout:
    """Where the tensors of a model lie in a vector: trainable parameters in their order, then floating buffers.

    Args:
        model: with all the parameters that any task trains requiring gradients.

    Attributes:
        names: of all tensors, in order.
        shapes: likewise.
        parts: where each lies.
        trained: how many of them are parameters.
        parameters: n, the entries that are parameters; the first ones.
        size: entries of the vector.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = len(named)
        named += [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]  # type: ignore[misc]
        self.names = [name for name, _ in named]
        self.shapes = [tuple(tensor.shape) for _, tensor in named]
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        self.parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.parameters, self.size = ends[self.trained], ends[-1]

    def read(self, model: nn.Module) -> Tensor:
        """The model's state (size,), float32."""
        return torch.cat([tensor.detach().float().reshape(-1) for tensor in self._tensors(model)])

    @torch.no_grad()
    def write(self, model: nn.Module, vector: Tensor) -> None:
        """Give the model the state `vector` (size,)."""
        for tensor, part, shape in zip(self._tensors(model), self.parts, self.shapes, strict=True):
            tensor.copy_(vector[part].view(shape))

    def named(self, vectors: Tensor) -> dict[str, Tensor]:
        """Views of parameters by name: (*s, *shape) out of vectors (*s, n or size)."""
        return {
            name: vectors[..., part].view(*vectors.shape[:-1], *shape)
            for name, part, shape in zip(
                self.names[: self.trained], self.parts, self.shapes[: self.trained], strict=False
            )
        }

    def _tensors(self, model: nn.Module) -> Sequence[Tensor]:
        known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [known[name] for name in self.names]
