"""Weights that one inner optimizer steps together: all of them, or a single one in per-layer mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspace_lab.optim.meter import Meter
from subspace_lab.optim.moments import Moments, carry_over, forget
from subspace_lab.optim.refreshing import Gather, Peers, refresh
from subspace_lab.optim.stack import Stack
from subspace_lab.optim.traits import OptimizerFactory, couples_decay, reads_weight
from subspace_lab.subspaces.base import Subspace

# Keys of an outer group that are ours; all others are the inner optimizer's and are passed on at every step.
OWN_KEYS = frozenset({"params", "param_names", "subspace", "flat", "scale", "weight_decay", "kind"})


@dataclass(frozen=True)
class Rules:
    """The policies of `SubspaceOptimizer`, documented there."""

    refresh_every: int
    moments: Moments
    stagger: bool
    decay: Literal["full", "inside"] | None
    eps_before_correction: bool
    decay_after: bool


class Unit:
    """Stacks of projected weights and plain weights with their inner optimizer.

    Args:
        stacks: the projected weights.
        plain: (outer group, weights) left to the inner optimizer as they are.
        outer: the outer parameter groups; read at every step, so schedulers act on them.
        t: steps taken by the plain weights.
        peers: processes with the same gradients, which divide the refreshes among them.
    """

    def __init__(
        self,
        stacks: list[Stack],
        plain: list[tuple[int, list[nn.Parameter]]],
        outer: list[dict[str, Any]],
        factory: OptimizerFactory,
        rules: Rules,
        meter: Meter,
        t: int = 0,
        peers: Peers | None = None,
    ) -> None:
        self.stacks, self.plain, self.outer, self.t = stacks, plain, outer, t
        self.factory, self.rules, self.meter, self.peers = factory, rules, meter, peers
        self.owners: list[tuple[int, Stack | None]] = []
        groups: list[dict[str, Any]] = []
        #: the inner group of each stack, then of each group of plain weights
        self.inner_groups: list[int] = []
        for s in stacks:
            last = self.owners[-1] if self.owners else None
            if s.direct and last is not None and last[1] is not None and last[1].direct and last[0] == s.group:
                groups[-1]["params"] = [*groups[-1]["params"], *s.coords]  # every group costs a step its overhead
            else:
                groups.append({"params": s.coords, "kind": "matrix", **self._options(s.group, s)})
                self.owners.append((s.group, s))
            self.inner_groups.append(len(groups) - 1)
        for g, ps in plain:
            groups.append({"params": ps, "kind": outer[g]["kind"], **self._options(g, None)})
            self.owners.append((g, None))
            self.inner_groups.append(len(groups) - 1)
        self.inner = factory(groups)

    def weights(self) -> list[Tensor]:
        """All weights of the unit."""
        return [p for s in self.stacks for p in s.params] + [p for _, ps in self.plain for p in ps]

    def step(self) -> None:
        """One step of every weight that has a gradient."""
        self._sync_options()
        active = [s for s in self.stacks if s.has_gradient]
        projected = [s for s in active if not s.direct]
        for s in active:
            s.bind()
        self._refresh(projected)
        for s in active:
            if s.direct:
                self._lift_gradients(s)
        moved = []
        for s, Z in zip(projected, self._mask([self._collect(s) for s in projected], projected), strict=True):
            start = self._weights_inside(s) if reads_weight(self.factory) else None
            moved.append((s, s.load_coordinates(Z, start), start))
        self.inner.step()
        for s in active:
            if s.direct:
                s.let_go()
                s.t += 1
        for s, step, start in moved:
            s.free_coordinates()
            self._apply(s, step if start is None else step - start)
            s.t += 1
        self.t += 1
        if self.rules.decay_after:
            self._shrink_plain()

    def _options(self, g: int, stack: Stack | None) -> dict[str, Any]:
        """The inner optimizer's options for outer group g; decay of projected weights is ours."""
        group = self.outer[g]
        options = {k: v for k, v in group.items() if k not in OWN_KEYS}
        if "weight_decay" in group:
            ours = stack is not None or self.rules.decay_after
            options["weight_decay"] = 0.0 if ours else group["weight_decay"]
        return options

    def _sync_options(self) -> None:
        """Schedulers and users change the outer groups; the inner ones follow."""
        for (g, stack), group in zip(self.owners, self.inner.param_groups, strict=True):
            outer = self.outer[g]
            for key in outer.keys() - OWN_KEYS:
                value, now = outer[key], group.get(key)
                if now is value:
                    continue
                if isinstance(now, Tensor):
                    now.fill_(value)
                else:
                    group[key] = value
            if stack is None and not self.rules.decay_after and "weight_decay" in group:
                group["weight_decay"] = self.outer[g]["weight_decay"]
            if self.rules.eps_before_correction and {"betas", "eps"} <= group.keys():
                t = 1 + (self.t if stack is None else stack.t)
                group["eps"] = group["eps"] / (1 - group["betas"][1] ** t) ** 0.5

    def _coupled(self, s: Stack) -> float:
        """Weight decay that belongs into the gradient."""
        group = self.outer[s.group]
        return float(group.get("weight_decay") or 0.0) if couples_decay(self.factory, group) else 0.0

    def _gather(self, s: Stack) -> Gather:
        """A function of a chunk: its gradients (b, p, q), and its weights where they are wanted."""
        coupled, grads = self._coupled(s), s.grads()
        wants_weight = bool(coupled) or s.subspace.needs_weight

        def gather(chunk: slice) -> tuple[Tensor, Tensor | None]:
            A, W = s.gather(grads, chunk), s.gather(s.params, chunk) if wants_weight else None
            return (A + coupled * W if coupled and W is not None else A), W

        return gather

    def _refresh(self, stacks: list[Stack]) -> None:
        """Choose the bases that are due."""
        due = [(s, members) for s in stacks if (members := s.due(self.rules.refresh_every))]
        done = refresh(due, self._gather, self.meter, self.peers)
        for (s, members), changes in zip(due, done, strict=True):
            if self.rules.moments == "reset" and len(members) == s.B and not s.subspace.full_size:
                forget(self.inner, s)
                continue
            for some, change in changes:
                carry_over(self.inner, s, some, change, self.rules.moments)

    def _collect(self, s: Stack) -> Tensor:
        """Coordinates of the gradient, Z (B, p, r)."""
        Z = torch.empty(s.coordinates, device=s.device)
        clean = s.subspace.arrives_clean(s.keys) and not self._coupled(s)
        energy: list[Tensor] = []
        gather = self._gather(s)
        for chunk in s.chunks():
            A = gather(chunk)[0]
            if clean:
                Z[chunk] = A
            else:
                s.subspace.project(A, chunk, out=Z[chunk])
            if self.meter.measure:
                energy.append(A.float().square().sum())
        if self.meter.measure:
            self.meter.add_energy(Z, energy, s.rows)
        return Z

    @staticmethod
    def _mask(coordinates: list[Tensor], stacks: list[Stack]) -> list[Tensor]:
        """NaN and inf reach Z through any product; such a matrix takes a zero gradient this step, in all its parts."""
        good = [torch.isfinite(Z.sum(dim=(1, 2))) for Z in coordinates]
        split = [i for i, s in enumerate(stacks) if s.rows is not None]
        if split:
            rows = stacks[split[0]].rows
            assert rows is not None
            bad = rows.largest(torch.cat([(~good[i]).float() for i in split]))
            for i, part in zip(split, bad.split_with_sizes([stacks[i].B for i in split]), strict=True):
                good[i] = part == 0
        return [Z.masked_fill_(~fine[:, None, None], 0.0) for Z, fine in zip(coordinates, good, strict=True)]

    def _lift_gradients(self, s: Stack) -> None:
        """The direct way: gradients (and coupled decay), lifted once, are what the inner optimizer moves weights by."""
        grads = s.grads()
        decay = self.outer[s.group].get("weight_decay")
        clean = s.subspace.arrives_clean(s.keys) and not decay
        energy: list[Tensor] = []
        if not self.meter.measure and not decay and s.B == 1:  # the same in fewer words, for small layers' sake
            if not clean and s.plain:
                grads = [s.subspace.lift_one(grads[0])]
            elif not clean:
                grads = [s.restore(s.subspace.lift(s.matrix(grads[0], 0).unsqueeze(0))[0], 0)]
        elif not clean or self.meter.measure:
            lifted: list[Tensor] = []
            for chunk in s.chunks():
                A = s.gather(grads, chunk)
                if self.meter.measure:
                    energy.append(A.float().square().sum())
                if decay:
                    A = A + decay * s.gather(s.params, chunk)
                Z = A if clean else s.subspace.lift(A, chunk)
                if self.meter.measure:
                    self.meter.add_energy(Z, energy)
                    energy = []
                lifted += [s.restore(z, i) for i, z in enumerate(Z.unbind(0), chunk.start)]
            grads = lifted
        s.point_at_weights(grads)

    @staticmethod
    def _weights_inside(s: Stack) -> Tensor:
        """Coordinates of the weights themselves (B, p, r)."""
        return torch.cat([s.subspace.project(s.gather(s.params, c), c) for c in s.chunks()])

    def _apply(self, s: Stack, step: Tensor) -> None:
        """W <- W + scale · lift(step), or a retraction, with decoupled weight decay."""
        group = self.outer[s.group]
        decay = 0.0 if couples_decay(self.factory, group) else float(group["lr"]) * (group.get("weight_decay") or 0.0)
        inside = (self.rules.decay or ("inside" if s.subspace.protects else "full")) == "inside"
        if decay and not inside and not self.rules.decay_after:
            s.shrink_(1 - decay)
        scale = float(group["scale"])
        step = step.mul_(scale) if scale != 1 else step  # on the small side, once
        curved = type(s.subspace).retract is not Subspace.retract
        for chunk in s.chunks():
            weights = s.gather(s.params, chunk) if curved or (decay and inside) else None
            Z = step[chunk]
            if decay and inside and weights is not None:
                Z = Z - decay * s.subspace.project(weights, chunk)
            if curved and weights is not None:
                s.assign_(s.subspace.retract(weights, s.subspace.lift(Z, chunk), chunk), chunk)
            elif not _add_in_place(s, Z, chunk):
                s.add_(s.subspace.lift(Z, chunk), chunk)
        if decay and not inside and self.rules.decay_after:
            s.shrink_(1 - decay)

    def _shrink_plain(self) -> None:
        for g, params in self.plain:
            decay = self.outer[g]["lr"] * (self.outer[g].get("weight_decay") or 0.0)
            moved: list[Tensor] = [p for p in params if p.grad is not None]
            if decay and moved:
                torch._foreach_mul_(moved, 1 - decay)


def _add_in_place(s: Stack, Z: Tensor, chunk: slice) -> bool:
    """One large fp32 matrix: W.addmm_(Z, Pᵀ), which needs no full-size temporary."""
    W = s.params[chunk.start]
    if s.flat or chunk.stop - chunk.start > 1 or W.dtype != Z.dtype:
        return False
    factors = s.subspace.factors(chunk)
    if factors is None:
        return False
    s.matrix(W, chunk.start).addmm_(Z[0], factors[0])
    return True
