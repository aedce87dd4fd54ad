"""A sequence of tasks from the command line: cut off anywhere, it ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab import cli, interrupt
from subspace_lab.training import checkpoint

WORDS = [
    "scenario.tasks=3",
    "trainer.max_steps=4",
    "optimizer.lr=0.5",
    "data.batch_size=40",
    "trainer.log_every=1",
    "trainer.checkpoint_every=1",
]
WORDS += ["trainer.keep_checkpoints=99", "trainer.progress=off", "export=false"]


def run(folder: Path, name: str, *words: str) -> Path:
    with contextlib.chdir(folder):
        assert cli.main([*WORDS, *words, f"hydra.run.dir={folder / name}"]) == 0
    return folder / name


def results(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "results.json").read_text())
    return found


def rows(place: Path) -> list[dict[str, str]]:
    with (place / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "per_second" not in k and v} for row in csv.DictReader(file)]


def same(left: Path, right: Path) -> None:
    a, b = (results(place)["continual"] for place in (left, right))
    assert a["accuracy_matrix"] == b["accuracy_matrix"] and a["ranks"] == b["ranks"]
    assert rows(left) == rows(right)
    states = [checkpoint.load(checkpoint.list_checkpoints(place)[0])["state_dict"] for place in (left, right)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def cut(place: Path, step: int) -> None:
    """As after kill -9 with the checkpoint of `step` the newest on the disk."""
    for path in checkpoint.list_checkpoints(place):
        if checkpoint.step_of(path) > step:
            path.unlink()
    (place / "results.json").unlink()


@pytest.fixture(scope="module", params=["gpm", "naive"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    method = str(request.param)
    return method, run(tmp_path_factory.mktemp(method), "whole", f"method={method}")


@pytest.mark.parametrize("step", [2, 4, 7, 12])
def test_cut_anywhere_it_ends_the_same(whole: tuple[str, Path], tmp_path: Path, step: int) -> None:
    """In the middle of the first task, at its end, in the middle of the second, at the end of the last."""
    import shutil

    method, place = whole
    shutil.copytree(place, tmp_path / "cut")
    cut(tmp_path / "cut", step)
    run(tmp_path, "cut", f"method={method}", "resume=auto")
    same(place, tmp_path / "cut")


def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, stop_at: Any, capfd: pytest.CaptureFixture[str]) -> None:
    place = run(tmp_path, "whole", "method=gpm")
    stop_at(6)
    with contextlib.chdir(tmp_path):
        assert cli.main([*WORDS, "method=gpm", f"hydra.run.dir={tmp_path}/cut"]) == 130
    told = capfd.readouterr().err
    assert "interrupted after step 6 of 8" in told and f"subspace-lab resume {tmp_path / 'cut'}" in told
    stop_at.reset()
    assert cli.main(["resume", str(tmp_path / "cut")]) == 0
    same(place, tmp_path / "cut")


def test_a_signal_at_the_end_of_a_task_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from subspace_lab.methods.continual.projection import GPM

    place = run(tmp_path, "whole", "method=gpm")
    end_task = GPM.end_task

    def asked(self: Any, model: Any, task: Any) -> None:
        if task.index == 1:
            raise KeyboardInterrupt
        end_task(self, model, task)

    monkeypatch.setattr(GPM, "end_task", asked)
    with contextlib.chdir(tmp_path):
        assert cli.main([*WORDS, "method=gpm", f"hydra.run.dir={tmp_path}/cut"]) == 130
    assert "interrupted after the training of task 2 of 3" in capfd.readouterr().err
    monkeypatch.setattr(GPM, "end_task", end_task)
    assert interrupt.requested() is None
    assert cli.main(["resume", str(tmp_path / "cut")]) == 0
    same(place, tmp_path / "cut")


def test_a_checkpoint_of_another_protocol_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["method=none", "data=digits", "model=mlp", "optimizer=sgd", "trainer.max_steps=2"]
    with contextlib.chdir(tmp_path):
        assert cli.main([*words, "trainer.progress=off", f"hydra.run.dir={tmp_path}/fit", "compare=null"]) == 0
        assert cli.main([*WORDS, "method=naive", f"resume={tmp_path}/fit"]) == 2
    assert "is not of a sequence of tasks" in capfd.readouterr().err
