"""Which tensors of a model make up the flat vector θ, in which order, and to which layer each belongs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subspace_lab.errors import UserError, did_you_mean


@dataclass(frozen=True)
class FlatLayout:
    """The selected parameters of a model as slices of one vector of D numbers.

    Tensors of one layer lie next to each other. A tied weight appears once, under its first name.

    Attributes:
        names: parameter names.
        shapes: their shapes.
        dtypes: their dtypes.
        layers: for each tensor, the index of its layer.
        layer_names: what the layers are called.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[str] | None = None) -> FlatLayout:
        """Select the trainable parameters whose names contain a match of one of the `targets`.

        Args:
            model: any module; parameters that do not require gradients stay outside.
            targets: regular expressions; None selects every trainable parameter.

        Raises:
            UserError: nothing is selected, a pattern is not a regular expression or matches nothing.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        chosen = trainable if targets is None else {n: trainable[n] for n in _matching(trainable, targets)}
        if not chosen:
            raise UserError("the model has no trainable parameter to put into the subspace")
        layer_names = list(dict.fromkeys(layer_of(name) for name in chosen))
        order = sorted(chosen, key=lambda name: layer_names.index(layer_of(name)))  # stable: model order inside a layer
        return cls(
            names=tuple(order),
            shapes=tuple(tuple(chosen[name].shape) for name in order),
            dtypes=tuple(chosen[name].dtype for name in order),
            layers=tuple(layer_names.index(layer_of(name)) for name in order),
            layer_names=tuple(layer_names),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each tensor."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Numbers in each layer."""
        totals = [0] * len(self.layer_names)
        for layer, size in zip(self.layers, self.sizes, strict=True):
            totals[layer] += size
        return tuple(totals)

    @property
    def D(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat (D,) tensor in the parameters' shapes, in order."""
        return [
            part.view(shape) for part, shape in zip(flat.split_with_sizes(list(self.sizes)), self.shapes, strict=True)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of names, shapes and dtypes in order, hexadecimal."""
        rows = [[n, list(s), str(t)] for n, s, t in zip(self.names, self.shapes, self.dtypes, strict=True)]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its path up to the first number in it, else the module that holds it.

    `roberta.encoder.layer.3.output.dense.weight` is in `roberta.encoder.layer.3`, `classifier.dense.bias` in
    `classifier.dense`.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


def _matching(names: Sequence[str] | dict[str, nn.Parameter], targets: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for pattern in targets:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(f"method.targets: '{pattern}' is not a regular expression: {error}") from None
        hits = [name for name in names if expression.search(name)]
        if not hits:
            words = {part for name in names for part in (name, *name.split("."))}
            raise UserError(
                f"method.targets: '{pattern}' matches no trainable parameter",
                hint=did_you_mean(pattern, sorted(words)) or f"the first are: {', '.join(list(names)[:5])}",
            )
        found.update(dict.fromkeys(hits))
    return [name for name in names if name in found]
