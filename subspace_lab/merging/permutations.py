"""Permutations of hidden units that leave a network's function as it is: which axes of which tensors go together.

Ainsworth, Hayase & Srinivasa, ICLR 2023, arXiv 2209.04836.  A permutation π of a layer's n units permutes the rows of
the layer's weight, its bias and its normalisation, and the columns of whatever reads the layer.  A
`PermutationSpec` names the permutation of each axis of each tensor; `subspace_lab.merging.architectures` finds it from
names and shapes of the tensors alone, so that it is there for files as well.

Two things go beyond one name per axis: queries, keys and values that lie one after the other in one axis, or the pixels
of a channel in the columns of the first linear layer (`Axis`); and attention heads, which move as blocks that the
units inside them cannot leave (`Heads`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.merging.sources import TensorInfo

Permutations = Mapping[str, Tensor]
"""name -> π (n,) int64: unit i of the permuted network is unit π_i of the given one."""

# Statistics have units of their own and say nothing about which unit is which; they are permuted, not compared.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Axis:
    """What permutes an axis.

    Attributes:
        parts: permutations of its parts, one after the other.
        each: consecutive entries that belong to one unit.
    """

    parts: tuple[str, ...]
    each: int = 1


def one(name: str, each: int = 1) -> Axis:
    """An axis with one permutation."""
    return Axis((name,), each)


@dataclass(frozen=True)
class Heads:
    """Permutations whose units lie in blocks, the heads; block i of all of them comes from the same head.

    Attributes:
        names: of the permutations: units of queries and keys, units of values and outputs.
        count: of heads.
    """

    names: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Touch:
    """A place where a permutation acts: rows start … stop of one axis of a tensor."""

    tensor: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class PermutationSpec:
    """Which permutation acts on which axis.

    Attributes:
        axes: tensor -> one entry for each of its axes; None: stays.  Tensors that are not in it stay as they are.
        sizes: permutation -> number n of its units.
        heads: groups of permutations that act on attention heads.
        family: what the networks are, for messages.
    """

    axes: Mapping[str, tuple[Axis | None, ...]]
    sizes: Mapping[str, int]
    heads: tuple[Heads, ...] = ()
    family: str = "given"

    @cached_property
    def touches(self) -> dict[str, list[Touch]]:
        """Where each permutation acts, of the tensors that are compared (statistics are not)."""
        found: dict[str, list[Touch]] = {name: [] for name in self.sizes}
        for tensor, axes in self.axes.items():
            if tensor.endswith(_STATISTICS):
                continue
            for index, axis in enumerate(axes):
                start = 0
                for part in axis.parts if axis is not None else ():
                    assert axis is not None
                    stop = start + self.sizes[part] * axis.each
                    found[part].append(Touch(tensor, index, start, stop))
                    start = stop
        return found

    @cached_property
    def units(self) -> list[tuple[str, ...]]:
        """What is matched at once: one permutation, or those of an attention layer's heads."""
        grouped = {name for heads in self.heads for name in heads.names}
        return [(name,) for name in self.sizes if name not in grouped] + [heads.names for heads in self.heads]

    def identity(self) -> dict[str, Tensor]:
        """The permutations that change nothing."""
        return {name: torch.arange(n) for name, n in self.sizes.items()}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Permutations drawn uniformly among those that the spec allows."""
        found = {name: torch.randperm(n, generator=generator) for name, n in self.sizes.items()}
        for heads in self.heads:
            order = torch.randperm(heads.count, generator=generator)
            for name in heads.names:
                width = self.sizes[name] // heads.count
                inside = torch.stack([torch.randperm(width, generator=generator) for _ in order])
                found[name] = (order[:, None] * width + inside).flatten()
        return found

    def index(self, axis: Axis, permutations: Permutations) -> Tensor:
        """Entry of an axis (k,) int64 -> entry of the given network that comes there."""
        found, start = [], 0
        for part in axis.parts:
            entries = permutations[part][:, None] * axis.each + torch.arange(axis.each)
            found.append(start + entries.flatten())
            start += self.sizes[part] * axis.each
        return torch.cat(found)

    def permute(self, name: str, W: Tensor, permutations: Permutations, leave: int | None = None) -> Tensor:
        """π(W) of one tensor.

        Args:
            name: of the tensor.  `<tensor>#i` is part i of its first axis.
            W: with the shape that the spec was made for.
            permutations: of all names that act on it.
            leave: an axis that is not permuted.
        """
        whole, _, part = name.partition("#")
        for index, axis in enumerate(self.axes.get(whole, ())):
            if axis is None or index == leave:
                continue
            if part and index == 0:
                axis = Axis((axis.parts[int(part)],), axis.each)
            W = W.index_select(index, self.index(axis, permutations).to(W.device))
        return W

    def apply(self, state: Mapping[str, Tensor], permutations: Permutations) -> dict[str, Tensor]:
        """π of all tensors of a state dict: the same function, other weights."""
        return {name: self.permute(name, W, permutations) for name, W in state.items()}

    def check(self, infos: Mapping[str, TensorInfo]) -> None:
        """Refuse a spec that does not fit the tensors.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for name, axes in self.axes.items():
            if name not in infos:
                raise UserError(f"the permutations of {self.family} networks want a tensor {name}: there is none")
            shape = infos[name].shape
            for index, axis in enumerate(axes):
                wanted = None if axis is None else axis.each * sum(self.sizes[part] for part in axis.parts)
                if len(axes) != len(shape) or wanted not in (None, shape[index]):
                    raise UserError(
                        f"{name} of shape {tuple(shape)} does not fit the permutations of {self.family} networks"
                    )


@dataclass
class SpecBuilder:
    """Collects the axes of a spec.

    Attributes:
        infos: shapes of all tensors.
    """

    infos: Mapping[str, TensorInfo]
    family: str
    axes: dict[str, tuple[Axis | None, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    heads: list[Heads] = field(default_factory=list)

    def unit(self, name: str, size: int) -> str:
        """Name a permutation of so many units."""
        self.sizes[name] = size
        return name

    def layer(self, path: str, rows: Axis | None, columns: Axis | None) -> None:
        """A linear map or convolution with its bias: weight (rows, columns, …) and bias (rows,)."""
        for weight in (f"{path}.weight", f"{path}_weight"):  # torch's attention has in_proj_weight
            if weight in self.infos:
                self.place(weight, rows, columns)
        for bias in (f"{path}.bias", f"{path}_bias"):
            if bias in self.infos:
                self.place(bias, rows)

    def norm(self, path: str, units: Axis | None) -> None:
        """Normalisation: everything of one axis that belongs to it."""
        for name, info in self.infos.items():
            if name.rpartition(".")[0] == path and len(info.shape) == 1 and info.dtype.is_floating_point:
                self.place(name, units)

    def place(self, name: str, *axes: Axis | None) -> None:
        """Say what permutes the first axes of a tensor; the others stay."""
        rest = len(self.infos[name].shape) - len(axes)
        self.axes[name] = (*axes, *[None] * rest)

    def read_by(self, name: str, units: str) -> Axis:
        """The second axis of a weight that reads these units, possibly several pixels of each.

        Raises:
            UserError: the sizes do not fit.
        """
        columns, n = self.infos[name].shape[1], self.sizes[units]
        if columns == 0 or columns % n:
            raise UserError(
                f"{name} reads {columns} numbers, no multiple of the {n} units before it: not a {self.family}",
                hint="method.spec=chain, resnet or vit; auto chooses by the tensors' names",
            )
        return one(units, columns // n)

    def done(self) -> PermutationSpec:
        """The spec, checked."""
        spec = PermutationSpec(self.axes, self.sizes, tuple(self.heads), self.family)
        spec.check(self.infos)
        return spec


def moved(permutations: Permutations) -> float:
    """Share of units that are not where they were."""
    n = sum(len(order) for order in permutations.values())
    return sum(int((order != torch.arange(len(order))).sum()) for order in permutations.values()) / max(1, n)
