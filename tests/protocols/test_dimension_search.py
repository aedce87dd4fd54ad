"""A whole search over stand-in runs: what it finds, what it keeps, how it is interrupted and continued."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from search.fakes import FAKE, D, configuration

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.dimension_search import DimensionSearch
from subspace_lab.protocols.outcome import Outcome

Searcher = Callable[..., Outcome]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searcher:
    """search(data={}, **arguments of DimensionSearch): the outcome, in one output folder per test."""
    monkeypatch.setattr(interrupt.request, "signal", None)

    def run(data: dict[str, Any] | None = None, change: dict[str, Any] | None = None, **arguments: Any) -> Outcome:
        cfg = configuration(tmp_path, **(data or {}))
        for key, value in (change or {}).items():
            cfg[key] = value
        run_dir = tmp_path / "outputs" / "fake" / "run"
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = {"global_baseline": 1.0, "d_min": 5, "cell": FAKE, **arguments}
        return DimensionSearch(**settings).run(cfg, run_dir, label="x", resume_dir=run_dir)

    return run


def cells(root: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((root / "outputs/fake/cells").glob("*/result.json"))]


def lives(root: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in (root / "outputs/fake/cells").glob("*/lives"))


def test_finds_the_answer_of_the_curve(search: Searcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = search()
    found = outcome.sections["search"]
    for name, threshold in (("global", 0.9), ("own", 0.9 * found["baseline"]["mean"])):
        exact = -55 * math.log(1 - threshold / 0.98)
        definition = found["definitions"][name]
        assert definition["status"] == "reached"
        assert exact * 0.93 < definition["value"] < exact * 1.25
        assert definition["low"] <= definition["value"] <= definition["high"]
        assert outcome.metrics[f"d_int90/{name}"] == definition["value"]
        assert outcome.metrics[f"d_int90/{name}/low"] == definition["low"]
        assert definition["compression"] == pytest.approx(D / definition["value"])
    assert outcome.metrics["d_int90/own"] <= outcome.metrics["d_int90/global"]
    assert outcome.objective == "d_int90/own"
    assert all(point["lr_factor"] == 1.0 and len(point["values"]) == 3 for point in found["points"])
    assert found["D"] == D and found["d_max"] == 4096 and found["cells"]["reused"] == 0
    # Every cell of a seed has the run's seed, and all are cut from one projection.
    seeds = {(cell["spec"]["kind"], cell["spec"]["seed"]) for cell in cells(tmp_path)}
    assert seeds == {(kind, seed) for kind in ("baseline", "subspace") for seed in (0, 1, 2)}
    told = capsys.readouterr().err
    assert "baseline seed 0 lr×0.3333: test 0." in told
    assert "(threshold 0.900 global, 0.8" in told and " left" in told and " cells" in told


def test_cells_run_what_they_should(search: Searcher, tmp_path: Path) -> None:
    search(grid=[50, 200], seeds=1)
    configs = [json.loads(file.read_text()) for file in (tmp_path / "outputs/fake/cells").glob("*/config.json")]
    baseline = [c for c in configs if c["method"]["name"] == "none"]
    subspace = [c for c in configs if c["method"]["name"] == "fake"]
    assert sorted(c["optimizer"]["lr"] for c in baseline) == pytest.approx([0.003333, 0.01, 0.03])
    assert {(c["method"]["d"], c["method"]["lr_factor"]) for c in subspace} == {
        (d, f) for d in (50, 200) for f in (0.3333, 1.0, 3.0)
    }
    for c in configs:
        assert not c["export"] and c["trainer"]["progress"] == "off" and c["trainer"]["checkpoint_every"] == 0
        assert c["logger"]["csv"] and not c["logger"]["wandb"] and c["subspace"] is None
        assert "grid" not in c["protocol"]
    for c in subspace:
        assert c["method"]["d_max"] == 4096 and c["method"]["seed"] == c["seed"]


def test_learning_rates_are_chosen_on_validation_data_and_once_beyond_the_edge(search: Searcher) -> None:
    found = search(data={"best": 9.0}, grid=[100, 300], seeds=2).sections["search"]
    for point in [found["baseline"], *found["points"]]:
        assert point["lr_factor"] == 9.0
        assert [entry["lr_factor"] for entry in point["scan"]] == [0.3333, 1.0, 3.0, 9.0]
    # Galloping scans around the neighbour's best: nine is the middle there, and needs no extension.
    found = search(data={"best": 9.0}, seeds=2).sections["search"]
    scans = [[entry["lr_factor"] for entry in point["scan"]] for point in found["points"]]
    assert scans.count([3.0, 9.0, 27.0]) == len(scans) - 1 and [0.3333, 1.0, 3.0, 9.0] in scans


def test_finer_grid_reuses_the_coarse_one_and_the_knobs_of_the_search(search: Searcher, tmp_path: Path) -> None:
    search(grid=[50, 200])
    before = lives(tmp_path)
    assert before == len(cells(tmp_path)) == 3 * 5
    found = search(grid=[50, 100, 200], confidence=0.5, bootstrap=10, fraction=0.8).sections["search"]
    assert lives(tmp_path) == before + 5
    assert found["cells"]["reused"] == before and found["cells"]["trained"] == 5
    more = search(grid=[50, 100, 200], seeds=4).sections["search"]
    assert more["cells"]["trained"] == 4 and more["points"][0]["values"][:3] == found["points"][0]["values"]
    search(grid=[50], seeds=1, data={"scale": 60.0})
    assert lives(tmp_path) == before + 5 + 4 + 6, "other data, other cells"


def test_unreached_and_all_pass(search: Searcher) -> None:
    outcome = search(d_max=60)
    definition = outcome.sections["search"]["definitions"]["own"]
    assert (
        definition["text"] == ">60" and definition["interval"] == "[>60, >60]" and definition["status"] == "unreached"
    )
    assert not [name for name in outcome.metrics if name.startswith("d_int90")]
    outcome = search(grid=[600, 900])
    definition = outcome.sections["search"]["definitions"]["own"]
    assert definition["text"] == "≤600" and definition["status"] == "below" and definition["value"] is None
    assert "d_int90/own" not in outcome.metrics
    json.dumps(outcome.sections, allow_nan=False)


def test_without_a_global_baseline(search: Searcher) -> None:
    outcome = search(global_baseline=None, grid=[50, 200], fraction=0.5)
    assert list(outcome.sections["search"]["definitions"]) == ["own"]
    assert outcome.objective == "d_int50/own"


def test_training_accuracy_is_asked_for(search: Searcher) -> None:
    outcome = search(metric="train/accuracy", select="train/accuracy", grid=[50, 200], seeds=1)
    assert "baseline/train/accuracy" in outcome.metrics
    with pytest.raises(UserError, match=r"no figure 'test/f1'.*test/accuracy"):
        search(metric="test/f1", grid=[50], seeds=1)


def test_diverged_runs_count_as_failed_and_are_never_chosen(search: Searcher) -> None:
    found = search(data={"diverges_from": 2.9, "best": 3.0}, grid=[100, 300], seeds=1).sections["search"]
    assert all(point["lr_factor"] == 1.0 for point in found["points"])
    assert all(point["scan"][2] == {"lr_factor": 3.0, "select": None, "metric": 0.0} for point in found["points"])
    assert all(point["diverged"] == 0 for point in found["points"])


def test_warm_continuation_starts_from_the_next_smaller_solution(search: Searcher, tmp_path: Path) -> None:
    search(grid=[50, 100, 200], seeds=2, continuation="warm")
    by_key = {cell["key"]: cell["spec"] for cell in cells(tmp_path)}
    parents = {(c["spec"]["d"], c["spec"]["seed"]): c["spec"]["parent"] for c in cells(tmp_path) if c["spec"]["d"]}
    for (d, seed), parent in parents.items():
        if d == 50:
            assert parent is None
        else:
            assert (by_key[parent]["d"], by_key[parent]["seed"]) == (d // 2, seed)
    before = lives(tmp_path)
    search(grid=[50, 100, 200], seeds=2, continuation="warm")
    assert lives(tmp_path) == before
    search(grid=[50, 100, 200], seeds=2)
    assert lives(tmp_path) == before + 2 * 4, "a cold run is another computation than a warm one"


def test_interrupted_search_continues(search: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search.fakes import FakeFit

    train, calls = FakeFit._train, []

    def interrupted(self: FakeFit, run_dir: Path, seconds: float, label: str) -> None:
        calls.append(label)
        if len(calls) == 7:
            interrupt.request.signal = 2
        train(self, run_dir, 0.04, label)

    with monkeypatch.context() as patch:
        patch.setattr(FakeFit, "_train", interrupted)
        with pytest.raises(Interrupted, match=r"6 cells finished.*subspace-lab resume .*/outputs/fake/run"):
            search(grid=[50, 200])
    assert len(cells(tmp_path)) == 6
    interrupt.request.signal = None
    before = lives(tmp_path)
    found = search(grid=[50, 200]).sections["search"]
    assert (found["cells"]["reused"], found["cells"]["trained"]) == (6, 9)
    assert lives(tmp_path) == before + 9


def test_a_failing_cell_is_named(search: Searcher, tmp_path: Path) -> None:
    settings = {"grid": [50, 200], "seeds": 1}
    with pytest.raises(RuntimeError, match=r"ValueError: singular matrix \[d=200 seed 0 lr.*error.log"):
        search(data={"crash_at": 200}, **settings)
    assert "singular matrix" in next((tmp_path / "outputs/fake/cells").glob("*/error.log")).read_text()
    with pytest.raises(UserError, match=r"a wrong word \[d=200 .*the right word"):
        search(data={"mistake_at": 200}, **settings)
    kept = [cell for cell in cells(tmp_path) if cell["spec"]["d"] == 50]
    assert len(kept) == 2 * 3, "what was finished by then is kept"


def test_a_damaged_result_is_trained_again(search: Searcher, tmp_path: Path) -> None:
    search(grid=[50], seeds=1)
    file = next((tmp_path / "outputs/fake/cells").glob("*/result.json"))
    file.write_text(file.read_text()[:20])
    assert search(grid=[50], seeds=1).sections["search"]["cells"]["trained"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": []}, "no d in it"),
        ({"grid": [0]}, "at least 1"),
        ({"grid": [500], "d_max": 100}, "beyond protocol.d_max"),
        ({"d_min": 10, "d_max": 5}, "at least 10"),
        ({"ratio": 1.0}, "more than 1"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"fraction": 0.0}, "more than 0"),
        ({"grid": [D + 1], "seeds": 1}, "more than the D=17610"),
        ({"change": {"method": {"name": "galore"}}}, "method=galore does not have"),
        ({"change": {"compare": "adamw"}}, "trains its own baseline"),
        ({"launcher": "joblib", "change": {"trainer": {"devices": 2, "num_nodes": 1}}}, "one process each"),
        ({"launcher": "slurm"}, "launcher=slurm"),
    ],
)
def test_refusals(search: Searcher, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(**arguments)
