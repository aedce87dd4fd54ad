"""The words of a sweep: which keys it varies over what, and how Hydra reads a value back unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from subspace_lab import catalog


@dataclass(frozen=True)
class Swept:
    """One key of a sweep.

    Attributes:
        line: as typed, or as a search file has it.
        element: the key as it is written in an override, with its `+`.
        values: every value; of an interval its two ends.
        interval: whether only an adaptive sweeper can choose from it.
    """

    line: str
    element: str
    values: list[str]
    interval: bool


def quote(value: str) -> str:
    """Return a value as Hydra reads it back unchanged, whatever characters it has."""
    return "'" + value.replace("'", "\\'") + "'"


def searchpath(folders: Sequence[str]) -> str:
    """Return the override that adds folders of configuration groups."""
    return f"hydra.searchpath=[{','.join(quote(f'file://{folder}') for folder in folders)}]"


def deferred(overrides: Sequence[str]) -> list[str]:
    """Leave values of groups to the jobs where the groups themselves are swept.

    Hydra composes a sweep once without what is swept. A key of an option that only the swept ones choose
    (`method=fedavg,flag federation.byzantine=1`) would be unknown there, unless it is swept too, over one value.

    Returns:
        The overrides, changed where a group is swept.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if not any(o.is_sweep_override() and o.key_or_group in catalog.groups() for o in parsed):
        return list(overrides)
    told = []
    for text, override in zip(overrides, parsed, strict=True):
        root, dot, _ = override.key_or_group.partition(".")
        waits = dot and root in catalog.groups() and root not in ("hydra", "paths", "trainer")
        key, equals, value = text.partition("=")
        told.append(f"{key}=choice({value})" if waits and equals and not override.is_sweep_override() else text)
    return told


def split(lines: Sequence[str], parser: OverridesParser) -> tuple[dict[str, Swept], list[str]]:
    """Return the keys that are swept, in order, and the lines that are the same in every job.

    Args:
        lines: those of a search file first: what comes later of a key counts, as in Hydra's sweepers.
        parser: one that knows the configuration, for `glob`.
    """
    swept: dict[str, Swept] = {}
    fixed: dict[str, str] = {}
    for line, override in zip(lines, parser.parse_overrides(list(lines)), strict=True):
        key = override.key_or_group
        swept.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            interval = not override.is_discrete_sweep()
            swept[key] = Swept(line, override.get_key_element(), _values(override), interval)
        else:
            fixed[key] = line
    return swept, list(fixed.values())


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    assert isinstance(value, IntervalSweep)
    return [str(value.start), str(value.end)]
