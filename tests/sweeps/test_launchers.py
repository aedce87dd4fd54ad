"""Cells in other processes: one fails, one is killed, the others go on; by joblib, and by submitit without SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subspace_lab.sweeps import manifest

BOMB = """
import os, signal
from lightning.pytorch import Callback

class Bomb(Callback):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer, pl_module) -> None:
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 2:
            raise ValueError("went wrong\\nin two lines")
"""
WORDS = [
    "-m",
    "method=softmax",
    "model=mlp",
    "data=digits",
    "seed=1,2,3",
    "trainer.max_steps=4",
    "trainer.val_every=4",
]
WORDS += ["trainer.progress=off", "scheduler=constant", "export=false", "hydra.sweep.dir=sweep", "resume=auto"]
WORDS += ["+callbacks.bomb._target_=bomb.Bomb", "+callbacks.bomb.seed=${seed}"]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=8"],
}


def start(folder: Path, bomb: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "bomb.py").write_text(bomb)
    return subprocess.run(
        [sys.executable, "-m", "subspace_lab", *WORDS, *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "SUBSPACE_DEBUG": "0"},
        capture_output=True,
        text=True,
        timeout=560,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_the_others_go_on(launcher: str, tmp_path: Path) -> None:
    done = start(tmp_path, BOMB, *LAUNCHERS[launcher])
    sweep = tmp_path / "sweep"
    status = {n: json.loads((sweep / n / "results.json").read_text())["status"] for n in "012"}
    assert status == {"0": "failed", "1": "failed", "2": "completed"}, done.stderr
    assert done.returncode == 1
    told = done.stderr.split("2 of 3 cells failed:\n")[1].splitlines()
    assert told[0].startswith("  seed=1: its process died: ")
    assert told[1] == "  seed=2: went wrong (sweep/1/run.log)"
    assert "Traceback" not in done.stderr and "bug:" not in done.stderr
    before = (sweep / "2" / "results.json").stat().st_mtime_ns
    known = manifest.read(sweep)
    assert known is not None and [known.words(cell) for cell in known.cells] == [f"seed={n}" for n in (1, 2, 3)]
    if launcher != "joblib":
        return
    again = start(tmp_path, BOMB.replace("== 1", "is None").replace("== 2", "is None"))  # mended; and one after another
    assert again.returncode == 0 and "1 of 3 cells are finished already" in again.stderr, again.stderr
    assert (sweep / "2" / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_saves_what_runs_in_other_processes(tmp_path: Path) -> None:
    """A terminal sends it to the whole process group."""
    words = [word for word in WORDS if not word.startswith(("+callbacks", "trainer.max_steps", "trainer.val_every"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "subspace_lab", *words, *LAUNCHERS["joblib"], "trainer.max_steps=100000"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SUBSPACE_DEBUG": "0"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    files = [tmp_path / "sweep" / n / "metrics.csv" for n in "01"]
    patience = time.monotonic() + 400
    while not all(file.is_file() and len(file.read_text().splitlines()) > 2 for file in files):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("stopped: sweep interrupted, 0 of 3 cells are finished and what ran is saved; ")
    assert "Traceback" not in told
    for n in "01":
        run = tmp_path / "sweep" / n
        assert json.loads((run / "results.json").read_text())["status"] == "interrupted"
        assert list((run / "checkpoints").glob("step_*.ckpt"))
    assert not (tmp_path / "sweep" / "2" / "metrics.csv").exists()
