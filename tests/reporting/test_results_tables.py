"""results.json, tables, published figures, plots and the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.reporting import plots, published, report, results, tables
from subspace_lab.reporting.record import RunRecord, baseline_overrides, status_of


def about(seed: int = 0, method: str = "galore", **choices: str) -> dict[str, Any]:
    chosen = {"method": method, "optimizer": "adamw", "model": "llama_tiny", "data": "text"} | choices
    return {
        "name": "x",
        "method": method,
        "seed": seed,
        "config_hash": f"h{seed}",
        "choices": chosen,
        "environment": {},
    }


def record(folder: Path, perplexity: float, **kwargs: Any) -> None:
    folder.mkdir(parents=True)
    outcome = Outcome({"val/perplexity": perplexity, "val/loss": math.log(perplexity)}, {"steps": 10})
    RunRecord(folder, about(**kwargs), writes=True).write("completed", outcome)


def test_results_are_whole_finite_and_versioned(tmp_path: Path) -> None:
    outcome = Outcome({"val/loss": float("nan"), "val/perplexity": math.inf, "train/loss": 1.5})
    RunRecord(tmp_path, about(), writes=True).write("completed", outcome)
    raw = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert raw["schema_version"] == results.SCHEMA_VERSION and raw["status"] == "completed"
    assert raw["metrics"] == {"val/loss": None, "val/perplexity": None, "train/loss": 1.5}
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    silent = RunRecord(tmp_path, about() | {"command": ""}, writes=False)
    silent.start({})
    assert silent.write("failed")["status"] == "failed"
    assert not list(tmp_path.iterdir())


def test_a_finished_training_is_recognised_by_its_hash(tmp_path: Path) -> None:
    RunRecord(tmp_path, about(seed=1), writes=True).write("interrupted", Outcome({"a": 1.0}))
    assert RunRecord(tmp_path, about(seed=1), writes=True).finished() is not None
    assert RunRecord(tmp_path, about(seed=2), writes=True).finished() is None
    RunRecord(tmp_path, about(seed=1), writes=True).write("interrupted")
    assert RunRecord(tmp_path, about(seed=1), writes=True).finished() is None


def test_statuses() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert status_of(Interrupted("x")) == status_of(KeyboardInterrupt()) == "interrupted"
    assert status_of(MemoryError()) == status_of(OutOfMemoryError()) == "out_of_memory"
    assert status_of(UserError("x")) == status_of(ValueError()) == "failed"


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for text, pattern in (("{", "not a readable"), ("[]", "not a results.json"), ('{"a": 1}', "not a results.json")):
        file.write_text(text)
        with pytest.raises(UserError, match=pattern):
            results.read(file)
    file.write_text('{"schema_version": 99, "status": "completed", "metrics": {}}')
    with pytest.raises(UserError, match="newer"):
        results.read(file)


def test_report_groups_seeds_and_marks_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, perplexity in enumerate((10.0, 12.0, 14.0)):
        record(tmp_path / f"galore{seed}", perplexity, seed=seed)
    record(tmp_path / "deep" / "adamw", 9.0, method="none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "12.000 ± 2.000" in printed.out and "9.000" in printed.out
    assert printed.out.index("none") < printed.out.index("galore")  # best first
    assert "broken" in printed.err
    with pytest.raises(UserError, match=r"no results\.json"):
        report.main([str(tmp_path / "broken" / "nothing").replace("nothing", "")])
    with pytest.raises(UserError, match="no such file"):
        report.main([str(tmp_path / "nowhere")])


def test_published_figures() -> None:
    entry = published.lookup("galore_c4/60m/galore")
    assert entry["metrics"]["val/perplexity_galore_script"] == 34.88 and "2403.03507" in entry["source"]
    assert published.lookup("galore_c4/1b/adam")["metrics"]["val/perplexity_galore_script"] == 15.56
    with pytest.raises(UserError, match="did you mean 'galore'"):
        published.lookup("galore_c4/60m/galor")
    with pytest.raises(UserError, match="did you mean 'galore_c4'"):
        published.lookup("galore_c5/60m")
    with pytest.raises(UserError, match="name one entry"):
        published.lookup("galore_c4/60m")
    table = tables.beside_published({"val/perplexity_galore_script": 34.88 * 1.1}, entry)
    assert list(table.columns[3].cells) == ["+10.0 %"]


def test_comparison_shows_only_what_there_is() -> None:
    table = tables.comparison(
        [("a", {"val/perplexity": 21.5, "subspace/refresh_share": 0.05}), ("b", {"val/perplexity": 3e5})]
    )
    assert list(table.columns[0].cells) == ["validation perplexity", "share of time in refreshes"]
    assert list(table.columns[1].cells) == ["21.500", "5.0 %"]
    assert list(table.columns[2].cells) == ["3e+05", "—"]


@pytest.mark.parametrize("size,text", [(0, "0 B"), (999, "999 B"), (3_599_470, "3.6 MB"), (26.95e9, "26.95 GB")])
def test_bytes(size: float, text: str) -> None:
    assert tables.write_bytes(size) == text


def test_plot_of_two_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = "".join(f"{s},{5 / s},{100 / s if s % 5 == 0 else ''}\n" for s in range(1, 21))
        (tmp_path / name / "metrics.csv").write_text("step,train/loss,val/perplexity\n" + rows)
    assert plots.read_curve(tmp_path / "a", "val/perplexity") == ([5, 10, 15, 20], [20.0, 10.0, 100 / 15, 5.0])
    target = plots.draw_loss([("a", tmp_path / "a"), ("b", tmp_path / "b")], tmp_path / "plots" / "loss.png", "t")
    assert target is not None and target.read_bytes()[:4] == b"\x89PNG"
    assert plots.draw_loss([("none", tmp_path)], tmp_path / "no.png", "t") is None
    assert plots.smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert plots.smooth([3.0, 1.0]) == [3.0, 1.0]  # a short curve stays as it is


def test_baseline_overrides() -> None:
    own = "method=galore method.rank=8 +method.x=1 subspace=random optimizer.lr=1 optimizer=sgd seed=3 data=c4"
    own += " compare=adamw resume=auto export=true hydra.run.dir=x trainer.max_steps=9"
    kept = ["seed=3", "data=c4", "trainer.max_steps=9"]
    last = ["compare=null", "export=false"]
    assert baseline_overrides(own.split(), "adamw", ["adamw"]) == [*kept, "method=none", "optimizer=adamw", *last]
    assert baseline_overrides(own.split(), "fira", ["adamw"]) == [*kept, "method=fira", *last]
