"""The `search` section of results.json, described in docs/results.md: all that tables and plots are drawn from."""

from __future__ import annotations

import math
import statistics as library
from typing import Any

from subspace_lab.search import statistics
from subspace_lab.search.engine import Point, Search
from subspace_lab.search.statistics import Dimension


def name_of(fraction: float) -> str:
    """Return what a dimension at this fraction of the baseline is called: d_int90."""
    return f"d_int{100 * fraction:g}"


def of(search: Search, *, confidence: float, resamples: int) -> dict[str, Any]:
    """Return the section of a finished search.

    Args:
        search: with its points.
        confidence: of the intervals.
        resamples: bootstrap samples.
    """
    plan, curve = search.plan, search.curve()
    baseline = search.baseline.values(plan.metric)
    found = statistics.dimensions(
        curve,
        baseline,
        fraction=plan.fraction,
        global_baseline=plan.global_baseline,
        confidence=confidence,
        resamples=resamples,
        seed=plan.seeds[0],
    )
    fitted = statistics.fit(curve)
    ds = sorted(curve)
    baselines = {"own": statistics.mean(baseline), "global": plan.global_baseline}
    return {
        "name": name_of(plan.fraction),
        "metric": plan.metric,
        "select": plan.select,
        "fraction": plan.fraction,
        "confidence": confidence,
        "resamples": resamples,
        "continuation": "warm" if plan.warm else "cold",
        "seeds": list(plan.seeds),
        "D": search.parameters,
        "d_max": search.d_max,
        "baseline": _point(search.baseline, search),
        "definitions": {
            name: {"baseline": baselines[name]} | _definition(dimension, ds, search.parameters)
            for name, dimension in found.items()
        },
        "points": [
            {"d": d, "fit": fitted[d]}
            | {"passes": {name: statistics.exceeds(fitted[d], at.threshold) for name, at in found.items()}}
            | _point(search.points[d], search)
            for d in ds
        ],
        "cells": {
            "trained": sum(not cell.reused for cell in search.cells.values()),
            "reused": sum(cell.reused for cell in search.cells.values()),
            "seconds": sum(cell.seconds for cell in search.cells.values()),
            "folder": str(search.factory.root),
        },
    }


def metrics(section: dict[str, Any]) -> dict[str, float]:
    """Return the flat figures: only numbers that were measured, so no entry where a search ended without one."""
    name = section["name"]
    flat: dict[str, float] = {
        f"baseline/{section['metric']}": section["baseline"]["mean"],
        "subspace/D": float(section["D"]),
    }
    for definition, found in section["definitions"].items():
        entries = {"": "value", "/low": "low", "/high": "high", "/interpolated": "interpolated"}
        for suffix, entry in entries.items():
            if found[entry] is not None:
                flat[f"{name}/{definition}{suffix}"] = float(found[entry])
    return flat


def _point(point: Point, search: Search) -> dict[str, Any]:
    metric, select = search.plan.metric, search.plan.select
    values = point.values(metric)
    ladder = search.plan.ladder
    return {
        "mean": statistics.mean(values),
        "sd": library.stdev(values) if len(values) > 1 else None,
        "values": values,
        "diverged": sum(cell.diverged for cell in point.runs.values()),
        "lr_factor": ladder.factor(point.rung),
        "scan": [
            {
                "lr_factor": ladder.factor(rung),
                "select": None if cell.diverged else cell.value(select),
                "metric": cell.value(metric),
            }
            for rung, cell in sorted(point.scan.items())
        ],
        "cells": [point.runs[seed].key for seed in sorted(point.runs)],
    }


def _definition(found: Dimension, ds: list[int], parameters: int) -> dict[str, Any]:
    crossing = found.crossing
    reached = math.isfinite(crossing.grid)
    value = int(crossing.grid) if reached and not crossing.below else None
    low, high = found.grid_interval
    return {
        "threshold": found.threshold,
        "status": "unreached" if not reached else "below" if crossing.below else "reached",
        "value": value,
        "text": _text(-math.inf if crossing.below else crossing.grid, ds),
        "low": _number(low),
        "high": _number(high),
        "interval": f"[{_text(low, ds)}, {_text(high, ds)}]",
        "interpolated": None if crossing.below else _number(crossing.interpolated),
        "interpolated_low": _number(found.interpolated_interval[0]),
        "interpolated_high": _number(found.interpolated_interval[1]),
        "paper_rule": found.paper_rule,
        "compression": parameters / value if value else None,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float, ds: list[int]) -> str:
    if value == math.inf:
        return f">{ds[-1]}"
    return f"≤{ds[0]}" if value == -math.inf else f"{value:.0f}"
