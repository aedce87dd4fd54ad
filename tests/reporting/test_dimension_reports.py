"""Tables and the plot of a dimension search, from its section of results.json alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from search.fakes import FAKE, configuration

from subspace_lab.protocols.dimension_search import DimensionSearch
from subspace_lab.reporting import dimension_plot, dimension_tables, report


@pytest.fixture
def section(tmp_path: Path) -> dict[str, Any]:
    search = DimensionSearch(grid=[50, 110, 200], seeds=2, global_baseline=1.0, bootstrap=50, cell=FAKE)
    outcome = search.run(configuration(tmp_path), tmp_path, label="x", resume_dir=tmp_path)
    found: dict[str, Any] = json.loads(json.dumps(outcome.sections["search"]))
    return found


def text(table: Any) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def test_tables_and_published_figures(section: dict[str, Any]) -> None:
    printed = text(dimension_tables.points(section))
    assert "baseline 1 2 0.98" in printed and "110 160 2 0.8" in printed
    published = {"source": "a paper", "metrics": {"d_int90/global": 1750, "d_int90/own": [525, 625]}}
    printed = text(dimension_tables.definitions(section, published))
    assert "global baseline own baseline" in printed and "published 1,750 525 – 625" in printed
    assert "threshold, 90 % 0.9000 0.88" in printed and "90 % interval [" in printed and "a paper" in printed
    assert dimension_tables.notes(section) == ["with fewer than 3 seeds the interval says next to nothing"]


def test_open_ends_are_told(section: dict[str, Any], tmp_path: Path) -> None:
    unreached, below = section["definitions"]["global"], section["definitions"]["own"]
    empty = {"value": None, "low": None, "high": None, "interpolated": None, "paper_rule": None, "compression": None}
    unreached |= {**empty, "status": "unreached", "text": ">2000", "interval": "[>2000, >2000]"}
    below |= {**empty, "status": "below", "text": "≤50", "interval": "[≤50, ≤50]"}
    printed = text(dimension_tables.definitions(section, None))
    assert "d_int90 >2,000 ≤50" in printed and "published" not in printed
    notes = " ".join(dimension_tables.notes(section))
    assert "try a larger protocol.d_max" in notes and "an upper bound only" in notes
    assert dimension_plot.draw(section, tmp_path / "plots" / "open.png", "t").is_file()


def test_plot_of_a_single_point(section: dict[str, Any], tmp_path: Path) -> None:
    one = copy.deepcopy(section)
    one["points"] = one["points"][:1]
    for name, found in (("many", section), ("one", one)):
        assert dimension_plot.draw(found, tmp_path / f"{name}.png", "a title").stat().st_size > 10_000


def test_report_lists_searches_apart(
    section: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"schema_version": 1, "status": "completed", "metrics": {}, "timing": {}}
    for name, more in (("search", {"search": section, "name": "digits"}), ("fit", {"method": "galore"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(common | more))
    assert report.main([tmp_path]) == 0
    printed = capsys.readouterr().out
    assert "digits/search" in printed and "d_int90/global" in printed and "galore" in printed
    assert f"{section['definitions']['own']['value']} [" in printed
