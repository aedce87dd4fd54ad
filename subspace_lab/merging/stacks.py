"""Stacks of tensors that come from `Sources`, and the flat pieces that elementwise methods and surveys go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import full_precision
from subspace_lab.merging.base import Stack
from subspace_lab.merging.grouping import Group, Part, pieces, steps
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.sources import Sources, TensorInfo

T = TypeVar("T")


class SourceStack(Stack):
    """Tensors of a group, read from sources on demand.

    Args:
        sources: base and models.
        group: which parts.
        whole: the parts are whole tensors; those with infinities or NaN are refused when they are read (LAPACK never
            returns on some of them), others when they are merged.
    """

    def __init__(self, sources: Sources, group: Group, *, whole: bool = True) -> None:
        self.parts, self.dtype, self._sources, self._whole = group.parts, group.dtype, sources, whole
        self.names = [part.name for part in group.parts]
        self.kind, self.shape, self.models = group.kind, group.parts[0].shape, sources.models
        self.start = group.parts[0].start if len(group.parts) == 1 else 0

    def view(self, model: int | None, part: Part) -> Tensor:
        """A part of one model, flat, not to be written to: without a copy where it is stored in the stack's dtype."""
        return self._sources.read(model, part.tensor, part.start, part.stop).to(self.dtype)

    def _gather(self, model: int | None) -> Tensor:
        found = self._empty()
        for row, part in zip(found, self.parts, strict=True):
            self._checked(row.copy_(self.view(model, part)), model, part)
        return found.view(-1, *self.shape)

    def _empty(self) -> Tensor:
        count = self.parts[0].stop - self.parts[0].start
        return torch.empty(len(self.parts), count, dtype=self.dtype, device=self._sources.device)

    def _difference(self, t: int, part: Part, out: Tensor) -> Tensor:
        for step in steps(part):
            place = out[step.start - part.start : step.stop - part.start]
            torch.sub(self.view(t, step), self.view(None, step), out=place)
            if self._whole:
                self._sources.release()
        return self._checked(out, t, part)

    def _checked(self, values: Tensor, model: int | None, part: Part) -> Tensor:
        if self._whole:
            if not bool(values.sum().isfinite()):
                refuse_non_finite(self._sources, (part,), [model, None])
            self._sources.release()  # the pages of all models of a large tensor would be T times its size
        return values

    @override
    def base(self) -> Tensor:
        return self._gather(None)

    @override
    def tuned(self, t: int) -> Tensor:
        return self._gather(t)

    @override
    def delta(self, t: int) -> Tensor:
        found = self._empty()
        for row, part in zip(found, self.parts, strict=True):
            self._difference(t, part, row)
        return found.view(-1, *self.shape)

    @override
    def total(self) -> Tensor:
        if not self._whole and self._sources.device.type == "cpu":
            return self._streamed_total()
        found = self.delta(0)
        rows = found.view(len(self.parts), -1)
        D = torch.empty_like(rows[0])
        for t in range(1, self.models):
            for row, part in zip(rows, self.parts, strict=True):
                row.add_(self._difference(t, part, D))
        return found

    def _streamed_total(self) -> Tensor:
        """Sum of the weights minus as many bases: one addition per model, near the speed of reading.

        It differs from the sum of the differences by the weights' own rounding, and is 0 where nothing was trained.
        """
        W0 = self.view(None, self.parts[0])
        trained = [W for W in (self.view(t, self.parts[0]) for t in range(self.models)) if not torch.equal(W, W0)]
        if len(trained) < 2:
            return (torch.sub(trained[0], W0) if trained else torch.zeros_like(W0)).unsqueeze(0)
        found = torch.add(trained[0], trained[1])
        for W in trained[2:]:
            found.add_(W)
        return found.add_(W0, alpha=-len(trained)).unsqueeze(0)


class Selected(Sources):
    """The tensors of other sources that are merged: what `Merge.survey` sees.

    Args:
        sources: all of them.
        rules: which are left alone.
    """

    def __init__(self, sources: Sources, rules: TensorRules) -> None:
        self.labels, self.device, self._sources, self.rules = sources.labels, sources.device, sources, rules
        self._infos = {name: info for name, info in sources.infos().items() if rules.kind(name, info) is not None}

    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @override
    def read(self, model: int | None, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._sources.read(model, name, start, stop)

    @override
    def release(self) -> None:
        self._sources.release()


def each(work: Callable[[T], None], items: Iterable[T], *, at_once: bool) -> None:
    """Call `work` on every item; at once: in as many threads as torch has, each with one.

    LAPACK gains nothing from a second thread on small matrices, and short loops lose to starting it.
    """
    threads = torch.get_num_threads()
    if not at_once or threads == 1:
        for item in items:
            work(item)
        return

    def quiet(item: T) -> None:
        with torch.no_grad():  # belongs to a thread, as autocast does
            full_precision(work)(item)

    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(quiet, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def visit(sources: Sources, work: Callable[[SourceStack], None], names: Iterable[str]) -> None:
    """Call `work` on every flat piece of some tensors, from several threads at once and in any order."""
    infos = sources.infos()
    rules = sources.rules if isinstance(sources, Selected) else TensorRules()

    def look(group: Group) -> None:
        work(SourceStack(sources, group, whole=False))
        sources.release()

    groups = pieces({name: infos[name] for name in names}, rules, sources.device)
    each(look, groups, at_once=sources.device.type == "cpu")


def flat_stacks(sources: Sources) -> Iterator[SourceStack]:
    """Every tensor's flat pieces, one after the other, each let go of when the next is asked for."""
    rules = sources.rules if isinstance(sources, Selected) else TensorRules()
    for group in pieces(sources.infos(), rules, sources.device):
        yield SourceStack(sources, group, whole=False)
        sources.release()


def refuse_non_finite(sources: Sources, parts: Iterable[Part], models: Iterable[int | None]) -> None:
    """Say which tensor of which model has infinities or NaN.

    Raises:
        UserError: there is one.
    """
    models = list(models)
    for part in parts:
        for model in models:
            values = sources.read(model, part.tensor, part.start, part.stop).float()
            bad = int((~values.isfinite()).sum())
            if bad:
                where = "the base" if model is None else f"model {sources.labels[model]}"
                raise UserError(
                    f"tensor {part.tensor} of {where} has {bad} values that are not finite",
                    hint="is the checkpoint of a run that diverged? merge.exclude leaves a tensor as the base has it",
                )
