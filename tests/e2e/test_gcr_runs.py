"""Class subspaces from the command line: what one process learns, two learn, and an interrupted one too."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab import cli
from subspace_lab.training import checkpoint

WORDS = ["method=gcr", "model=mlp", "trainer.max_steps=16", "trainer.val_every=8", "trainer.log_every=1"]
WORDS += ["trainer.checkpoint_every=8", "trainer.progress=off", "scheduler=constant", "optimizer.lr=0.02"]


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "subspace_lab", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def rows(run: Path, *names: str) -> list[list[str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gcr")
    with contextlib.chdir(folder):
        assert cli.main([*WORDS, f"hydra.run.dir={folder}/one"]) == 0
    return folder / "one"


def test_the_run_ends_with_all_figures(alone: Path) -> None:
    metrics = results(alone)["metrics"]
    assert metrics["test/accuracy"] > 0.6 and metrics["probe/digits/accuracy"] > 0.8
    assert metrics["subspace/k"] == 8 and 0 < metrics["features/intra_class_angle"] < 90
    assert all(0 < float(error) < 2e-6 for (error,) in rows(alone, "subspace/orthonormality") if error)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(alone: Path, strategy: str) -> None:
    """FSDP gives 5 of the 10 subspaces to each process, whole ones, and every one is stepped where it lies."""
    run = alone.parent / strategy
    words = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=64"]
    done = start(alone.parent, *WORDS, *words, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    for name in ("train/loss", "val/loss", "val/accuracy"):
        left, right = ([float(v) for (v,) in rows(r, name) if v] for r in (alone, run))
        assert left == pytest.approx(right, rel=1e-3), name
    one, two = (results(r)["metrics"] for r in (alone, run))
    for name in ("test/accuracy", "probe/accuracy", "features/intra_class_angle"):
        assert one[name] == pytest.approx(two[name], abs=0.02, rel=1e-3), name
    from safetensors.torch import load_file

    exported = [load_file(r / "export" / "model.safetensors") for r in (alone, run)]
    assert exported[0].keys() == exported[1].keys()
    assert exported[1]["5.bases.k8"].shape == (10, 8, 100)


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    words = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=64"]
    assert start(tmp_path, *WORDS, *words, f"hydra.run.dir={tmp_path}/fsdp").returncode == 0
    copy = _cut_off(tmp_path / "fsdp")
    done = start(tmp_path, "resume", str(copy))
    assert done.returncode == 0 and "continuing from step 8" in done.stderr, done.stderr
    _same(tmp_path / "fsdp", copy)


def test_an_interrupted_run_goes_on_bit_for_bit(alone: Path) -> None:
    state = checkpoint.load(checkpoint.path_for(alone, 8))["optimizer_states"][0]
    moments = [s for s in state["state"].values() if "step" in s]
    assert len(moments) == 1 and moments[0]["momentum_buffer"].abs().max() > 0 and moments[0]["step"] == 8
    copy = _cut_off(alone)
    with contextlib.chdir(alone.parent):
        assert cli.main(["resume", str(copy)]) == 0
    _same(alone, copy)


def _cut_off(run: Path) -> Path:
    """A copy of a run that never got beyond step 8."""
    copy = run.parent / f"{run.name}_again"
    shutil.copytree(run, copy)
    for file in [copy / "results.json", *copy.glob("checkpoints/step_00000016*")]:
        file.unlink()
    words = (copy / ".hydra" / "overrides.yaml").read_text().replace(str(run), str(copy))
    (copy / ".hydra" / "overrides.yaml").write_text(words)
    return copy


def _same(run: Path, copy: Path) -> None:
    names = ("step", "train/loss", "val/loss", "subspace/orthonormality")
    assert rows(copy, *names) == rows(run, *names)
    ends = [checkpoint.load(checkpoint.path_for(r, 16)) for r in (run, copy)]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    for own, other in zip(*(end["optimizer_states"][0]["state"].values() for end in ends), strict=True):
        assert all(torch.equal(torch.as_tensor(own[k]), torch.as_tensor(other[k])) for k in own)
