"""The report of a sweep, from files alone: best cell, paired differences, what is lost, CSV, plots."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from subspace_lab import cli
from subspace_lab.reporting import grouping, paired, report, scores, sweep_plots
from subspace_lab.sweeps import manifest


def run_of(folder: Path, overrides: Sequence[str], status: str = "completed", message: str = "", **metrics: Any) -> Any:
    typed = dict(text.partition("=")[::2] for text in overrides)
    found = {
        "schema_version": 1,
        "status": status,
        "name": "sweep",
        "method": typed.get("method", "galore"),
        "seed": int(typed.get("seed", 0)),
        "choices": {"method": typed.get("method", "galore"), "optimizer": "adamw", "model": "mlp", "data": "digits"},
        "overrides": list(overrides),
        "timing": {"steps": 60},
        "objective": "val/loss",
        "metrics": {name.replace("__", "/"): value for name, value in metrics.items()},
        **({"message": message} if message else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    return found


def grid(root: Path, keys: dict[str, Sequence[object]], figure: Any, sweeper: str = "BasicSweeper") -> Path:
    """Write a sweep: a run for each combination whose figure is a number, a failed one for text, none for None."""
    cells = []
    for number, values in enumerate(itertools.product(*keys.values())):
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        cells.append(manifest.Cell(str(number), overrides, f"h{number}"))
        found = figure(**{key.rsplit(".", 1)[-1]: value for key, value in zip(keys, values, strict=True)})
        if isinstance(found, str):
            run_of(root / str(number), overrides, "failed", found)
            (root / str(number) / "run.log").write_text("")
        elif found is not None:
            run_of(root / str(number), overrides, val__perplexity=found, val__loss=found / 10)
    manifest.write(root, manifest.Manifest("subspace-lab -m …", sweeper, list(keys), cells))
    return root


GAINS = {"none": 0.0, "galore": -1.0}


def perplexity(method: str, lr: float, seed: int) -> float | str | None:
    if (method, lr, seed) == ("galore", 0.1, 0):
        return "ValueError: rank=-1"
    if (method, lr, seed) == ("galore", 0.1, 2):
        return None
    return 20 + GAINS[method] * (1 + 0.25 * seed) + 3 * seed + 50 * abs(lr - 0.01)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return grid(
        tmp_path / "s", {"method": ["none", "galore"], "optimizer.lr": [0.01, 0.1], "seed": range(3)}, perplexity
    )


def test_best_baseline_and_what_is_lost(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "s"]) == 0
    out = capsys.readouterr().out
    assert "best val/perplexity: method=galore optimizer.lr=0.01, 21.750 ± 2.750 (3 seeds)" in out
    gaps = ttest_rel([19, 21.75, 24.5], [20, 23, 26])
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["method=galore", "optimizer.lr=0.01"]]
    assert line.split()[2:4] == ["method=none", "optimizer.lr=0.01"], "the baseline with the same learning rate"
    assert line.split()[4:] == ["-1.25", "±", "0.25", "3", "3", f"{gaps.pvalue:.3f}"]
    assert "; -1.25 ± 0.25 against the best baseline (method=none optimizer.lr=0.01)" in out
    assert "1 of 12 cells failed:\n  method=galore optimizer.lr=0.1 seed=0: ValueError: rank=-1 (s/9/run.log)" in out
    assert "1 of 12 cells is not started:\n  method=galore optimizer.lr=0.1 seed=2" in out


def test_another_baseline_and_metric(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "s", "--baseline", "method=galore optimizer.lr=1e-2", "--metric", "val/loss"]) == 0
    out = capsys.readouterr().out
    assert "best val/loss: method=galore" in out and "against the best baseline" not in out, "it is the best itself"
    rows = [line.split() for line in out.splitlines() if line.count("method=") == 2]
    assert [row[:4] for row in rows] == [
        [*ours, "method=galore", "optimizer.lr=0.01"]
        for ours in (
            ["method=none", "optimizer.lr=0.01"],
            ["method=galore", "optimizer.lr=0.1"],
            ["method=none", "optimizer.lr=0.1"],
        )
    ]
    assert (sweep / "plots" / "val_loss_vs_optimizer.lr.png").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "no results.json below empty"),
        (["s", "--metric", "val/perplex"], "did you mean 'val/perplexity'"),
        (["s", "--baseline", "method=non"], "did you mean 'none'"),
        (["s", "--baseline", "method.rank=4"], "no run says method.rank"),
        (["s", "--baseline", "none"], "expected key=value"),
        (["s", "--markdwon"], "did you mean '--markdown'"),
        (["s", "--csv"], "--csv"),
        ([], "report needs the folders"),
    ],
)
def test_mistakes_are_one_line(
    sweep: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert cli.main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1


def test_csv_has_every_run_with_figures(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "s", "--csv", "out/table.csv", "--markdown"]) == 0
    assert "|" in capsys.readouterr().out
    with open("out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["method"] for row in rows} == {"none", "galore"}
    first = rows[0]
    assert (first["optimizer.lr"], first["seed"], first["val/perplexity"], first["data"]) == (
        "0.01",
        "0",
        "20.0",
        "digits",
    )


def test_cells_of_an_earlier_sweep_count(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    grid(tmp_path / "old", {"method": ["none"], "seed": range(2)}, lambda method, seed: 10.0 + seed)
    new = grid(
        tmp_path / "new", {"method": ["none", "galore"], "seed": range(2)}, lambda method, seed: 9.0 + 0.5 * seed
    )
    known = manifest.read(new)
    assert known is not None
    for n in range(2):
        (new / str(n) / "results.json").unlink()
        known.cells[n].folder = f"../old/{n}"
    manifest.write(new, known)
    assert report.main([new]) == 0
    out = capsys.readouterr().out
    assert "10.500 ± 0.707" in out and "9.250 ± 0.354" in out and "not started" not in out
    assert report.main([tmp_path]) == 0
    assert capsys.readouterr().out.count("10.500 ± 0.707") == 1, "and count once"


def axes_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep what is drawn, to look at lines and bars rather than at pixels."""
    kept: dict[str, Any] = {}
    save = sweep_plots._save

    def keep(draw: Any, target: Path, title: str) -> Path:
        def draw_and_keep(axes: Any) -> None:
            draw(axes)
            kept[target.name] = axes

        return save(draw_and_keep, target, title)

    monkeypatch.setattr(sweep_plots, "_save", keep)
    return kept


def test_plots_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = axes_of(monkeypatch)
    keys = {"method": ["none", "galore"], "optimizer.lr": [0.001, 0.01, 0.1], "seed": range(3)}
    grid(tmp_path, keys, lambda method, lr, seed: (5 if method == "none" else 4) + lr + seed)
    assert report.main([tmp_path]) == 0
    files = {file.name for file in (tmp_path / "plots").iterdir()}
    assert files == {"val_perplexity_vs_optimizer.lr.png", "val_perplexity_by_method.png"} == set(kept)
    lines = kept["val_perplexity_vs_optimizer.lr.png"]
    assert lines.get_xscale() == "log" and len(lines.containers) == 2
    best, _, (sds,) = lines.containers[0]
    assert list(best.get_xdata()) == [0.001, 0.01, 0.1] and best.get_ydata() == pytest.approx([5.001, 5.01, 5.1])
    assert [segment[1][1] - segment[0][1] for segment in sds.get_segments()] == pytest.approx([2.0] * 3), (
        "± sd of 0 1 2"
    )
    assert [text.get_text() for text in lines.get_legend().get_texts()] == ["galore", "none"], "best first"
    bars = kept["val_perplexity_by_method.png"]
    assert [patch.get_height() for patch in bars.patches] == pytest.approx([6.001, 5.001]), "each at its best"
    assert [label.get_text() for label in bars.get_xticklabels()] == ["none\nlr=0.001", "galore\nlr=0.001"]


def test_two_numbers_make_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = axes_of(monkeypatch)
    grid(
        tmp_path,
        {"method.rank": [1, 2, 3], "optimizer.lr": [1, 2], "seed": [0, 1]},
        lambda rank, lr, seed: rank + 10 * lr + seed,
    )
    report.main([tmp_path])
    image = kept["val_perplexity_map.png"].images[0].get_array()
    assert image.tolist() == [[11.5, 12.5, 13.5], [21.5, 22.5, 23.5]]
    assert kept["val_perplexity_vs_method.rank.png"].get_xscale() == "linear"


def test_a_search_has_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = axes_of(monkeypatch)
    figures = [50.0, None, 20.0, 30.0]
    grid(
        tmp_path,
        {"optimizer.lr": [0.5, 0.7, 0.02, 0.003]},
        lambda lr: figures[[0.5, 0.7, 0.02, 0.003].index(lr)],
        "OptunaSweeper",
    )
    report.main([tmp_path])
    assert set(kept) == {"val_loss_history.png", "val_loss_vs_optimizer.lr.png"}, "what was searched for"
    trials, best, lost = kept["val_loss_history.png"].lines
    assert (
        list(trials.get_xdata()) == [0, 2, 3] and list(best.get_ydata()) == [5, 2, 2] and list(lost.get_xdata()) == [1]
    )


def test_runs_without_a_key_are_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = axes_of(monkeypatch)
    cells = []
    for number, words in enumerate(
        (["method=none"], ["method=galore", "method.rank=4"], ["method=galore", "method.rank=8"])
    ):
        run_of(tmp_path / str(number), words, val__perplexity=9.0 - number)
        cells.append(manifest.Cell(str(number), words, str(number)))
    manifest.write(tmp_path, manifest.Manifest("", "BasicSweeper", ["method", "method.rank"], cells))
    report.main([tmp_path])
    axes = kept["val_perplexity_vs_method.rank.png"]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [9.0]
    assert len(axes.containers) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 4, 8], True),
        ([1, 2, 3, 4], False),
        ([0.001, 0.003, 0.01, 0.03], True),
        ([0, 1, 10], False),
        ([1, 4], False),
        ([0.01, 0.1], True),
    ],
)
def test_geometric(values: list[float], expected: bool) -> None:
    assert sweep_plots.is_geometric(values) is expected


def test_paired_differences_need_common_seeds() -> None:
    score = scores.score_named("val/accuracy")
    assert not score.lower and scores.score_named("val/loss").lower and scores.score_named("forgetting").lower

    def runs(values: dict[int, float]) -> list[Any]:
        return [{"seed": seed, "metrics": {"val/accuracy": value}} for seed, value in values.items()]

    base = grouping.Group(("none",), ())
    told = paired.compare(runs({0: 0.9, 1: 0.8, 5: 0.1}), runs({0: 0.8, 1: 0.85, 2: 0.9}), base, score)
    assert told is not None and (told.pairs, told.wins) == (2, 1) and told.mean == pytest.approx(0.025)
    assert paired.compare(runs({0: 0.9}), runs({1: 0.9}), base, score) is None
    same = paired.compare(runs({0: 0.9, 1: 0.9}), runs({0: 0.8, 1: 0.8}), base, score)
    assert same is not None and same.wins == 2 and (same.p is None or same.p < 1e-6)
    one = paired.compare(runs({0: 0.9}), runs({0: float("nan")}), base, score)
    assert one is None, "a diverged run makes no pair"
