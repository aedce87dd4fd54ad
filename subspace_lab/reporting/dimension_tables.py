"""Tables of a dimension search, made from the `search` section of its results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.reporting.results import Results

if TYPE_CHECKING:
    from rich.table import Table


def points(search: Mapping[str, Any]) -> Table:
    """Return one row per d, the baseline first."""
    names = list(search["definitions"])
    table = _table("d", "D/d", "seeds", search["metric"], "fit", "lr ×", *(f"> {name}" for name in names))
    baseline = search["baseline"]
    first = ["baseline", "1", str(len(baseline["values"])), _mean_sd(baseline), "", f"{baseline['lr_factor']:g}"]
    table.add_row(*first, *(f"{search['definitions'][name]['threshold']:.4f}" for name in names), style="dim")
    for point in search["points"]:
        passes = ["yes" if point["passes"][name] else "no" for name in names]
        ratio = f"{search['D'] / point['d']:,.0f}"
        seeds = str(len(point["values"]))
        factor = f"{point['lr_factor']:g}"
        table.add_row(f"{point['d']:,}", ratio, seeds, _mean_sd(point), f"{point['fit']:.4f}", factor, *passes)
    return table


def definitions(search: Mapping[str, Any], published: Mapping[str, Any] | None) -> Table:
    """Return one column per definition: the dimension, its interval, and what was published.

    Args:
        search: the section.
        published: an entry of `reporting.published`, or None.
    """
    found: Mapping[str, Mapping[str, Any]] = search["definitions"]
    table = _table("", *(f"{name} baseline" for name in found))
    rows: list[tuple[str, list[str]]] = [
        ("baseline", [f"{entry['baseline']:.4g}" for entry in found.values()]),
        (f"threshold, {100 * search['fraction']:g} %", [f"{entry['threshold']:.4f}" for entry in found.values()]),
        (search["name"], [_thousands(entry["text"]) for entry in found.values()]),
        (f"{100 * search['confidence']:g} % interval", [entry["interval"] for entry in found.values()]),
        ("interpolated in log d", [_interpolated(entry) for entry in found.values()]),
        ("first mean above", [_number(entry["paper_rule"]) for entry in found.values()]),
        ("D/d", [_number(entry["compression"]) for entry in found.values()]),
    ]
    if published:
        theirs = [_published(published["metrics"].get(f"{search['name']}/{name}")) for name in found]
        rows.insert(3, ("published", theirs))
        table.caption, table.caption_justify = f"published: {published['source']}", "left"
    for label, cells in rows:
        table.add_row(label, *cells, style="bold" if label == search["name"] else None)
    return table


def notes(search: Mapping[str, Any]) -> list[str]:
    """Return what should be known when reading the tables, a line each."""
    found = []
    lost = sum(point["diverged"] for point in search["points"])
    if lost:
        found.append(f"{lost} runs diverged and count with what they reached, or 0")
    for name, definition in search["definitions"].items():
        if definition["status"] == "unreached":
            found.append(f"the {name} threshold is not exceeded by any d tried; try a larger protocol.d_max")
        if definition["status"] == "below":
            found.append(f"the {name} threshold is exceeded by the smallest d tried: an upper bound only")
    if len(search["seeds"]) < 3:
        found.append("with fewer than 3 seeds the interval says next to nothing")
    return found


def summary(runs: Sequence[tuple[Path, Results]]) -> Table:
    """Return one row per dimension search.

    Args:
        runs: (run folder, results with a `search` section).
    """
    names = list(dict.fromkeys(name for _, results in runs for name in _dimension_names(results["search"])))
    table = _table("search", "model", "data", "status", "seeds", "D", "baseline", *names)
    for folder, results in runs:
        search, choices = results["search"], results.get("choices", {})
        texts = _dimension_names(search)
        table.add_row(
            f"{results.get('name', '?')}/{folder.name}",
            str(choices.get("model", "?")),
            str(choices.get("data", "?")),
            str(results.get("status", "?")),
            str(len(search["seeds"])),
            f"{search['D']:,}",
            _mean_sd(search["baseline"]),
            *(texts.get(name, "—") for name in names),
        )
    return table


def _dimension_names(search: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{search['name']}/{name}": f"{found['text']} {found['interval']}"
        for name, found in search["definitions"].items()
    }


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _mean_sd(point: Mapping[str, Any]) -> str:
    return f"{point['mean']:.4f}" + ("" if point["sd"] is None else f" ± {point['sd']:.3f}")


def _interpolated(found: Mapping[str, Any]) -> str:
    if found["interpolated"] is None:
        return "—"
    low, high = (_number(found[f"interpolated_{end}"]) for end in ("low", "high"))
    return f"{_number(found['interpolated'])} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:,.0f}"


def _thousands(text: str) -> str:
    digits = text.lstrip("≤>")
    return f"{text.removesuffix(digits)}{int(digits):,}"


def _published(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return " – ".join(_number(part) for part in value)
    return _number(value)
