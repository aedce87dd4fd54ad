"""Searches over real runs through the command line: cut off inside a run and continued, in workers, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspace_lab import interrupt

pytestmark = pytest.mark.slow

SHORT = [
    "method=intrinsic_dimension",
    "protocol.grid=[20,60]",
    "protocol.seeds=2",
    "protocol.lr_factors=[1.0,3.0]",
    "trainer=cpu",
    "trainer.max_steps=40",
    "trainer.val_every=40",
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """command(folder, *words): what `subspace-lab` with a short search and these words returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(interrupt.request, "signal", None)

    def run(folder: str, *words: str) -> int:
        from subspace_lab.cli import main

        place = [f"paths.output_root={tmp_path / folder}", f"hydra.run.dir={tmp_path / folder / 'run'}"]
        argv = list(words) if words and words[0] in ("resume", "report") else [*SHORT, *place, *words]
        monkeypatch.setattr("sys.argv", ["subspace-lab", *argv])
        return main(argv)

    return run


def section(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "run" / "results.json").read_text())
    assert found["status"] == "completed"
    search: dict[str, Any] = found["search"]
    return search


def test_cut_off_inside_a_run_continued_and_reported(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from subspace_lab.training.callbacks.method import MethodDriver

    assert command("whole") == 0
    whole, printed = section(tmp_path / "whole"), capsys.readouterr()
    assert printed.out.rstrip().splitlines()[-1] == str(tmp_path / "whole" / "run")
    assert "global baseline" in printed.out and "own baseline" in printed.out
    assert (tmp_path / "whole" / "run" / "plots" / "accuracy_vs_d.png").stat().st_size > 10_000

    end = MethodDriver.on_train_batch_end

    def stop(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        end(self, trainer, module, *args)
        if module.method.name != "none" and trainer.global_step == 25:
            interrupt.request.signal = 2

    with monkeypatch.context() as patch:
        patch.setattr(MethodDriver, "on_train_batch_end", stop)
        assert command("cut") == 130
    interrupt.request.signal = None
    run = tmp_path / "cut" / "run"
    assert f"subspace-lab resume {run}" in capsys.readouterr().err
    assert json.loads((run / "results.json").read_text())["status"] == "interrupted"
    cells = next((tmp_path / "cut").glob("*/cells"))
    assert len(list(cells.glob("*/checkpoints/*.ckpt"))) == 1
    assert command("cut", "resume", str(run)) == 0
    assert "continuing from step 25" in capsys.readouterr().err
    cut = section(tmp_path / "cut")
    assert cut["points"] == whole["points"] and cut["definitions"] == whole["definitions"]
    assert not list(cells.glob("*/checkpoints")), "a finished cell keeps its figures only"

    assert command("cut", "report", str(tmp_path / "cut")) == 0
    printed = capsys.readouterr().out
    assert "d_int90/global" in printed and "d_int90/own" in printed and "17,610" in printed


def test_workers_train_the_same_runs(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("alone", "protocol.seeds=1") == 0
    assert command("workers", "protocol.seeds=1", "protocol.launcher=joblib", "protocol.workers=2") == 0
    alone, workers = section(tmp_path / "alone"), section(tmp_path / "workers")
    for one, other in zip(alone["points"], workers["points"], strict=True):
        assert one["cells"] == other["cells"], "where a cell runs is not part of what it is"
        assert one["values"] == pytest.approx(other["values"], abs=0.02)


def test_warm_continuation(command: Callable[..., int], tmp_path: Path) -> None:
    words = ("protocol.seeds=1", "protocol.lr_factors=[1.0]")
    assert command("cold", *words) == 0
    assert command("warm", *words, "protocol.continuation=warm") == 0
    cold, warm = section(tmp_path / "cold"), section(tmp_path / "warm")
    assert warm["points"][0]["values"] == cold["points"][0]["values"]
    assert warm["points"][1]["cells"] != cold["points"][1]["cells"]


def test_a_search_refuses_what_has_no_d(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("none", "method=none", "protocol=dimension_search", "data=digits", "model=mlp") == 2
    assert "method=none does not have" in capsys.readouterr().err
