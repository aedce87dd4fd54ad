"""Merging state dicts that are in memory: what notebooks, federated servers and tests call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.merging.base import Merge
from subspace_lab.merging.engine import Shelf, Sink, run
from subspace_lab.merging.grouping import Part, compute_dtype
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.sources import StateDicts


class _Tensors(Sink):
    """Merged tensors in memory, made beforehand."""

    def __init__(self, made: Mapping[str, Tensor]) -> None:
        self._flat = {name: tensor.view(-1) for name, tensor in made.items()}

    @override
    def place(self, name: str, start: int, count: int, like: Tensor) -> Tensor | None:
        flat = self._flat[name]
        if flat.dtype != like.dtype or flat.device != like.device:
            return None
        return flat[start : start + count]

    @override
    def put(self, name: str, start: int, values: Tensor) -> None:
        self._flat[name][start : start + values.numel()].copy_(values)


class _Kept(Shelf):
    def __init__(self) -> None:
        self._updates: dict[str, Tensor] = {}

    @override
    def keep(self, part: Part, update: Tensor) -> None:
        self._updates[part.name] = update.clone()

    @override
    def fetch(self, part: Part) -> Tensor:
        return self._updates.pop(part.name)


def merge_state_dicts(
    method: Merge,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    rules: TensorRules | None = None,
    labels: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """W0 + λ U of every tensor; those that are not floating-point are the base's.

    Args:
        method: the rule; one that needs data has learnt already.
        base: W0 by name.
        models: W_t by name.
        rules: which tensors are matrices, and which are left alone; default: those of the group `merge`.
        labels: names of the models, for messages and random bits; default: 1, 2, ….
        device: where to compute; default: where the tensors are.
        out: contiguous tensors like the base's to write into; default: new ones.

    Returns:
        name -> tensor in the base's dtype and on the base's device; nothing that was given is changed.

    Raises:
        UserError: a tensor has infinities or NaN.
    """
    if out is None:
        out = {name: torch.empty_like(W, memory_format=torch.contiguous_format) for name, W in base.items()}
    merged = {name: out[name] for name in base}
    sources = StateDicts(base, models, labels, device)
    run(method, sources, rules or TensorRules(), _Tensors(merged), shelf=_Kept)
    return merged


def update_state_dicts(
    method: Merge,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    rules: TensorRules | None = None,
    labels: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The update U (with its factor) of every tensor that is merged, for trying several λ without merging again.

    Returns:
        name -> U in float32 (float64 where the base is), on the base's device; arguments as in `merge_state_dicts`.
    """
    rules = rules or TensorRules()
    sources = StateDicts(base, models, labels, device)
    made = {
        name: torch.empty(info.shape, dtype=compute_dtype(info.dtype), device=base[name].device)
        for name, info in sources.infos().items()
        if rules.kind(name, info) is not None
    }
    run(method, sources, rules, _Tensors(made), shelf=_Kept, update_only=True)
    return made
