"""What drives a method over all tensors: a stack at a time is read, merged and written.

At any moment there is one stack in memory (two, if the method allows it and they are small), and of one model at a time
where the method can do with that; no stack is larger than the largest tensor.  Nothing here knows where tensors come
from or go to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision
from subspace_lab.merging.base import Merge
from subspace_lab.merging.grouping import Group, Part, piece_bytes, pieces, stacks, steps
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.sources import Sources
from subspace_lab.merging.stacks import Selected, SourceStack, each, refuse_non_finite

_SMALL = 1 << 25  # bytes of a stack: two of them at once never matter


class Sink(ABC):
    """Where merged tensors go; may be called from several threads, never twice for the same entries."""

    def place(self, name: str, start: int, count: int, like: Tensor) -> Tensor | None:
        """Memory (count,) of `like`'s dtype and device to compute these entries in; None: they are to be `put`."""
        return None

    @abstractmethod
    def put(self, name: str, start: int, values: Tensor) -> None:
        """Entries of one tensor from `start` on, flat, in any floating dtype; they are not kept."""


class Shelf(ABC):
    """Where updates wait in their own precision until the method knows its factor."""

    @abstractmethod
    def keep(self, part: Part, update: Tensor) -> None:
        """Put aside the update (flat) of a part."""

    @abstractmethod
    def fetch(self, part: Part) -> Tensor:
        """What was put aside, flat; may be overwritten."""


@full_precision
@torch.no_grad()
def run(
    method: Merge,
    sources: Sources,
    rules: TensorRules,
    sink: Sink,
    *,
    shelf: Callable[[], Shelf],
    update_only: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, int]:
    """Merge everything: W0 + λ · factor · U, or only factor · U.

    Args:
        method: the rule; one that needs data has learnt already.
        sources: base and models.
        rules: which tensors are matrices, and which are left alone.
        sink: gets every tensor of the base, those left alone as they are (not with `update_only`).
        shelf: makes the place where a method with a factor keeps its updates.
        update_only: leave out the base and λ.
        advance: is told how many entries of the base are done.

    Returns:
        How many tensors were merged as `matrix` and as `other`, and how many `kept` as the base has them.

    Raises:
        UserError: a tensor has infinities or NaN.
    """
    infos = sources.infos()
    kinds = {name: rules.kind(name, info) for name, info in infos.items()}
    method.survey(Selected(sources, rules))
    kept = shelf() if method.has_factor else None
    scale = 1.0 if update_only else method.scale

    def merge(group: Group) -> None:
        stack = SourceStack(sources, group, whole=not method.elementwise)
        updates = method.update(stack).view(len(group.parts), -1)
        for part, U in zip(group.parts, updates, strict=True):
            if kept is not None:
                kept.keep(part, U)
            else:
                _deliver(sources, sink, stack, part, U, scale, update_only=update_only)
                advance(U.numel())
        sources.release()

    if method.elementwise:
        each(merge, pieces(infos, rules, sources.device), at_once=method.concurrent)
    else:
        groups = stacks(infos, rules)
        each(merge, [group for group in groups if group.bytes <= _SMALL], at_once=method.concurrent)
        each(merge, [group for group in groups if group.bytes > _SMALL], at_once=False)
    if kept is not None:
        factor = method.factor()
        for group in stacks(infos, rules):
            stack = SourceStack(sources, group)
            for part in group.parts:
                U = kept.fetch(part).to(sources.device)
                _deliver(sources, sink, stack, part, U, scale * factor, update_only=update_only)
                advance(U.numel())
            sources.release()
    if not update_only:
        for name in (name for name, kind in kinds.items() if kind is None):
            _copy(sources, sink, name, advance)
    counts = Counter("kept" if kind is None else str(kind) for kind in kinds.values())
    return {kind: counts[kind] for kind in ("matrix", "other", "kept")}


def _deliver(
    sources: Sources, sink: Sink, stack: SourceStack, part: Part, U: Tensor, factor: float, *, update_only: bool
) -> None:
    for step in steps(part):
        update = U[step.start - part.start : step.stop - part.start]
        place = sink.place(step.tensor, step.start, update.numel(), U)
        if update_only:
            result = torch.mul(update, factor, out=place)
        else:
            result = torch.add(stack.view(None, step), update, alpha=factor, out=place)
        if not bool(result.sum().isfinite()):
            refuse_non_finite(sources, (part,), [None, *range(sources.models)])
        if place is None:
            sink.put(step.tensor, step.start, result)
        if step.stop < part.stop:
            sources.release()


def _copy(sources: Sources, sink: Sink, name: str, advance: Callable[[int], None]) -> None:
    info = sources.infos()[name]
    length = piece_bytes(sources.device) // info.dtype.itemsize
    for start in range(0, info.numel, length):
        count = min(length, info.numel - start)
        sink.put(name, start, sources.read(None, name, start, start + count))
        advance(count)
        sources.release()
