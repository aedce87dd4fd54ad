"""Which cells of a sweep run: all, those that are missing, those that failed; whatever ran them before."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from omegaconf import DictConfig

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted
from subspace_lab.sweeps import manifest


def the_sweep(root: Path) -> Path:
    (sweep,) = root.glob("outputs/*/sweeps/*")
    return sweep


def failing(*broken: int):
    def figure(cfg: DictConfig) -> float:
        if cfg.seed in broken:
            raise ValueError(f"seed {cfg.seed} went wrong\nsecond line")
        return float(cfg.seed)

    return figure


def test_a_failed_cell_is_told_and_the_others_go_on(command, training, tmp_path: Path) -> None:
    training.figure = failing(0)
    answer = command("-m", "method=none", "seed=0,1")
    assert answer.code == 1
    assert len(training.cells) == 2
    assert "1 of 2 cells failed:" in answer.err
    assert "  seed=0: seed 0 went wrong (outputs/none_llama_tiny_stdlib_text/sweeps/" in answer.err
    assert "/0/run.log)" in answer.err and "second line" not in answer.err.split("cells failed")[1]
    assert "Traceback" not in answer.err and "bug" not in answer.err
    assert "subspace-lab -m method=none seed=0,1 resume=auto" in answer.err
    log = (the_sweep(tmp_path) / "0" / "run.log").read_text()
    assert "Traceback" in log and "second line" in log


def test_a_second_time_only_what_failed_runs(command, training, tmp_path: Path) -> None:
    training.figure = failing(1)
    command("-m", "method=none", "seed=0,1")
    sweep = the_sweep(tmp_path)
    before = (sweep / "0" / "results.json").stat().st_mtime_ns
    training.figure, training.cells[:] = failing(), []
    answer = command("-m", "method=none", "seed=0,1", "resume=auto")
    assert answer.code == 0, answer.err
    assert training.cells == [("none", 1, 0.002)] and training.folders[-1] == sweep / "1"
    assert "1 of 2 cells are finished already" in answer.err
    assert (sweep / "0" / "results.json").stat().st_mtime_ns == before
    training.cells.clear()
    assert command("-m", "method=none", "seed=0,1", "resume=auto").code == 0
    assert not training.cells and len(list(sweep.parent.iterdir())) == 1


@pytest.mark.slow
def test_an_extended_grid_takes_over_what_is_done(command, training, tmp_path: Path) -> None:
    training.figure = failing(1)
    command("-m", "seed=0,1,2", "optimizer.lr=0.1")
    training.figure, training.cells[:] = failing(), []
    answer = command("-m", "seed=3,2,1,0", "optimizer.lr=0.1", "resume=auto")
    assert answer.code == 0, answer.err
    assert [seed for _, seed, _ in training.cells] == [3, 1], "not in the grid before, and failed before"
    assert "2 of 4 cells are finished already, 2 of them in earlier sweeps" in answer.err
    newest = max(tmp_path.glob("outputs/*/sweeps/*"), key=lambda folder: folder.name)
    known = manifest.read(newest)
    assert known is not None and len(known.cells) == 4
    assert sum(cell.folder.startswith("../") for cell in known.cells) == 2
    seeds = [json.loads((newest / cell.folder / "results.json").read_text())["seed"] for cell in known.cells]
    assert seeds == [3, 2, 1, 0], "whoever reads the new sweep finds all of it"
    training.cells.clear()
    command("-m", "seed=3,2,1,0", "optimizer.lr=0.2", "resume=auto")
    assert len(training.cells) == 4, "another configuration"


@pytest.mark.slow
def test_another_method_joins(command, training) -> None:
    command("-m", "method=galore,none", "seed=0,1")
    training.cells.clear()
    assert command("-m", "method=galore,none,softmax", "seed=0,1", "resume=auto").code == 0
    assert [cell[:2] for cell in training.cells] == [("softmax", 0), ("softmax", 1)]


@pytest.mark.slow
def test_without_resume_everything_runs_again(command, training, tmp_path: Path) -> None:
    command("-m", "seed=0,1")
    command("-m", "seed=0,1")
    assert len(training.cells) == 4 and len(list(tmp_path.glob("outputs/*/sweeps/*"))) == 2


@pytest.mark.slow
def test_hashes_are_those_of_the_runs(command, training, tmp_path: Path) -> None:
    command("-m", "method=galore,none", "seed=0,1", "name=mine")
    sweep = the_sweep(tmp_path)
    known = manifest.read(sweep)
    assert known is not None and known.swept == ["method", "seed"]
    for cell in known.cells:
        assert (sweep / cell.folder / "config_hash").read_text().strip() == cell.config_hash
        assert known.words(cell) == " ".join(cell.overrides[:2])


@pytest.mark.slow
def test_a_folder_of_ones_own_choice(command, training, tmp_path: Path) -> None:
    subdir = "hydra.sweep.subdir=s${seed}"
    for expected in (["s4", "s5"], []):
        training.folders.clear()
        answer = command("-m", "seed=4,5", f"hydra.sweep.dir={tmp_path}/here", subdir, "resume=auto")
        assert answer.code == 0, answer.err
        assert [folder.name for folder in training.folders] == expected


def test_ctrl_c_stops_the_sweep_and_says_how_to_go_on(command, training) -> None:
    def stop(cfg: DictConfig) -> float:
        if cfg.seed == 1:
            interrupt.request.signal = signal.SIGINT
            raise Interrupted(
                "interrupted after step 5 of 10, everything is saved; continue with: subspace-lab resume x"
            )
        return 0.0

    training.figure = stop
    answer = command("-m", "method=none", "seed=0,1")
    assert answer.code == 130
    assert [seed for _, seed, _ in training.cells] == [0, 1]
    line = answer.err.strip().splitlines()[-1]
    assert line.startswith("stopped: sweep interrupted, 1 of 2 cells are finished and what ran is saved; ")
    assert line.endswith("continue with: subspace-lab -m method=none seed=0,1 resume=auto")
    interrupt.request.signal = None
    training.figure, training.cells[:] = failing(), []
    assert command("-m", "method=none", "seed=0,1", "resume=auto").code == 0
    assert [seed for _, seed, _ in training.cells] == [1]


@pytest.mark.slow
def test_a_diverged_cell_is_a_result(command, training) -> None:
    training.figure = lambda cfg: float("nan")
    assert command("-m", "seed=0,1").code == 0


@pytest.mark.slow
def test_a_memory_table_is_no_sweep_to_continue(command, training, tmp_path: Path) -> None:
    training.figure = failing()
    assert command("-m", "seed=0,1", "estimate=true").code == 0
    assert not list(tmp_path.rglob("sweep.json"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["lr_grid", "rank_grid"])
def test_search_files_are_sweeps(command, training, file: str) -> None:
    assert command(f"hparams_search={file}", "seed=0").code == 0
    assert len(training.cells) == 4
    training.cells.clear()
    assert command(f"hparams_search={file}", "seed=0", "resume=auto").code == 0 and not training.cells
