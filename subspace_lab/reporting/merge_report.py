"""What a merge is judged by: accuracies of base, merged model and experts, as a table and as merge.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FILE = "merge.png"
_COLLAPSE = 3.0  # times its share in the experts' predictions, and then half of all, at which a class is named
_HOW = {"validation": "chosen on validation data", "given": "as given", "none": ""}


def headline(section: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the averages, λ and how it was chosen, in words."""
    scale = section["scale"]
    told = f", λ = {scale['value']:g} {_HOW[scale['chosen']]}" if scale["chosen"] != "none" else ""
    seen = ", has seen the unlabelled test images" if section["transductive"] and section["part"] == "test" else ""
    return (
        f"{section['part']} accuracy in %, family {section['family']}{told}{seen}: merged "
        f"{100 * metrics['merged/accuracy']:.1f}, {100 * metrics['merged/normalized_accuracy']:.1f} % of the experts'"
    )


def table(section: Mapping[str, Any]) -> Table:
    """Return the accuracies in percent, a row for each task."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    columns = [of for of in ("base", "merged", "experts") if of in section]
    shown.add_column("task")
    for column in (*columns, "merged ÷ expert"):
        shown.add_column(column, justify="right")
    rows = [[section[of][name]["accuracy"] for of in columns] for name in section["tasks"]]
    for name, row in zip([*section["tasks"], "mean"], [*rows, _means(rows)], strict=True):
        merged, expert = row[columns.index("merged")], row[-1]
        share = f"{100 * merged / expert:.1f} %" if expert else "—"
        shown.add_row(name, *(f"{100 * value:.1f}" for value in row), share)
    return shown


def notes(section: Mapping[str, Any]) -> list[str]:
    """Return a line for each task of which the merged model predicts one class nearly always."""
    found = []
    for name in section["tasks"]:
        merged, expert = section["merged"][name]["marginals"], section["experts"][name]["marginals"]
        worst = max(range(len(merged)), key=lambda c: merged[c])
        if merged[worst] > 0.5 and merged[worst] > _COLLAPSE * expert[worst]:
            found.append(f"{name} has collapsed: {100 * merged[worst]:.0f} % of its images are taken for class {worst}")
    return found


def draw(section: Mapping[str, Any], target: Path, title: str) -> Path:
    """Draw accuracies by task and, where λ was searched, how the validation accuracy depends on it.

    Args:
        section: `merge` of results.json.
        target: the file; its folder is made.
        title: above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, curve = section["tasks"], section["scale"]["curve"]
    columns = [of for of in ("base", "merged", "experts") if of in section]
    width = 2.2 + 0.55 * len(names)
    figure = Figure(figsize=(width + (4 if curve else 0), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if curve else 1, squeeze=False, width_ratios=[width, 4] if curve else [1])[0]
    bars = panels[0]
    for k, of in enumerate(columns):
        places = [i + 0.8 * (k + 0.5) / len(columns) - 0.4 for i in range(len(names))]
        colour = {"base": "0.75", "merged": "C0", "experts": "C2"}[of]
        values = [100 * section[of][name]["accuracy"] for name in names]
        bars.bar(places, values, 0.8 / len(columns), color=colour, label=of)
    bars.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    bars.set(ylabel=f"{section['part']} accuracy (%)", ylim=(0, 100))
    bars.legend(frameon=False, ncols=len(columns), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    if curve:
        scales, scores = zip(*curve, strict=True)
        panels[1].plot(scales, [100 * score for score in scores], color="C0", marker=".", ms=4)
        panels[1].axvline(section["scale"]["value"], color="0.6", lw=1)
        panels[1].set(xlabel="λ", ylabel="normalised validation accuracy (%)")
    for axes in panels:
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def published_entry(entry: str) -> dict[str, Any]:
    """Return a published entry of a merge (`merging/<family>/…`) with the `family` of its checkpoints.

    Raises:
        UserError: there is no such entry.
    """
    from subspace_lab.reporting import published

    found = published.lookup(entry)
    file, family, *_ = entry.split("/")
    return found | {"family": family} if file == "merging" else found


def family_refusal(section: Mapping[str, Any], published: Mapping[str, Any]) -> str | None:
    """Return why published figures may not be put beside a run's: they are of other checkpoints; None if they may."""
    theirs = published.get("family")
    if theirs is None or theirs == section["family"]:
        return None
    return (
        f"the published figures are of the checkpoint family {theirs} and these of {section['family']}: "
        "they are not compared (the experts differ by points)"
    )


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
