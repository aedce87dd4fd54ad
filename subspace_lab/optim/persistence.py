"""The subspace optimizer's state as per-weight entries, and back into stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspace_lab.optim.shards import like, spread, whole
from subspace_lab.optim.stack import Stack, matrix_shape

if TYPE_CHECKING:
    from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
    from subspace_lab.optim.unit import Unit

Entries = dict[str, dict[str, Any]]


def export_state(optimizer: SubspaceOptimizer) -> Entries:
    """Parameter name -> {t, subspace.*, inner.*, group.*}: what it was stacked with, or cut into, leaves no trace.

    Of sharded weights all processes must ask: moments are put together.
    """
    names = {p: n for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    entries: Entries = {}
    for unit in optimizer.units:
        for index, s in enumerate(unit.stacks):
            for i, key in enumerate(s.keys):
                entry: dict[str, Any] = {"t": s.t} | _counters(unit, unit.inner_groups[index])
                entry |= {f"subspace.{k}": v for k, v in s.subspace.member_state(i).items()}
                state = unit.inner.state.get(s.coords[0 if s.stacked else i], {})
                entry |= {f"inner.{k}": _entire(s, _member(s, v, i), i) for k, v in state.items()}
                entries[key] = entry
        for index, (_, params) in enumerate(unit.plain, len(unit.stacks)):
            for p in params:
                state = {f"inner.{k}": whole(v) for k, v in unit.inner.state.get(p, {}).items()}
                entries[names[p]] = {"t": unit.t} | _counters(unit, unit.inner_groups[index]) | state
    return entries


def _counters(unit: Unit, index: int) -> dict[str, Any]:
    """What the inner optimizer keeps in a group and not with its parameters: LAMB's number of steps."""
    options = {"params", "kind", *unit.inner.defaults, *unit.outer[unit.owners[index][0]]}
    return {f"group.{k}": v for k, v in unit.inner.param_groups[index].items() if k not in options}


def _member(s: Stack, value: Any, i: int) -> Any:
    if s.stacked and isinstance(value, Tensor) and value.ndim:
        return value[i]
    return value


def _entire(s: Stack, value: Any, i: int) -> Any:
    """A moment (p, r) of a sharded weight with the rows of all processes."""
    if s.rows is None or not isinstance(value, Tensor) or value.ndim < 2:
        return value
    m, n = matrix_shape(s.owners[i])
    return whole(like(value, (n if s.transposed[i] else m, *value.shape[1:]), s.owners[i]))


def _own(s: Stack, state: dict[str, Any]) -> dict[str, Any]:
    """This process's rows of the moments of a weight."""
    if s.rows is None:
        return state
    return {k: s.rows.mine(v) if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in state.items()}


def _strip(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    # Copies: entries of one former stack share its counters, and a caller may go on using what it saved.
    # (Quantised moments are a subclass that belongs to one weight and cannot be cloned.)
    return {
        k.removeprefix(prefix): v.clone() if type(v) is Tensor else v for k, v in entry.items() if k.startswith(prefix)
    }


def import_state(optimizer: SubspaceOptimizer, entries: Entries) -> None:
    """Fill freshly built stacks and inner optimizers from `export_state`'s entries."""
    names = {p: n for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for unit in optimizer.units:
        states: list[dict[str, Any]] = []  # one per inner parameter, in the inner optimizer's order
        members = [s.keys[0] for s in unit.stacks] + [names[params[0]] for _, params in unit.plain]
        first: dict[int, str] = {}  # a member of every inner group
        for group, name in zip(unit.inner_groups, members, strict=True):
            first.setdefault(group, name)
        for s in unit.stacks:
            mine = [entries.get(k, {}) for k in s.keys]
            if all(mine):
                s.subspace.load_members([_strip(e, "subspace.") for e in mine])
            inner = [_own(s, _strip(e, "inner.")) for e in mine]
            states += [_join(inner)] if s.stacked else inner
        for _, params in unit.plain:
            states += [spread(_strip(entries.get(names[p], {}), "inner."), p) for p in params]
        template = unit.inner.state_dict()
        template["state"] = {i: state for i, state in enumerate(states) if state}
        for index, options in enumerate(template["param_groups"]):
            options.update(_strip(entries.get(first[index], {}), "group."))
        unit.inner.load_state_dict(template)


def _join(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the members' moments; counters are equal by construction of the stack."""
    return {
        k: torch.stack([m[k] for m in members]) if isinstance(v, Tensor) and v.ndim else v
        for k, v in members[0].items()
    }
