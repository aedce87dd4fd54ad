"""Averaged weights: class subspaces stay subspaces, and an interrupted average goes on as it was."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from subspace_lab import cli
from subspace_lab.training import checkpoint

WORDS = [
    "method=gcr",
    "model=mlp",
    "protocol=fit",
    "trainer.max_steps=24",
    "trainer.val_every=12",
    "scheduler=constant",
]
WORDS += ["trainer.checkpoint_every=12", "trainer.progress=off", "trainer.log_every=4", "optimizer.lr=0.05"]


def run(folder: Path, *words: str) -> Path:
    with contextlib.chdir(folder.parent):
        assert cli.main([*WORDS, *words, f"hydra.run.dir={folder}"]) == 0
    return folder


def error(S: Tensor) -> float:
    return (S @ S.mT - torch.eye(S.shape[1])).abs().max().item()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("averaging") / "ema", "callbacks=ema", "callbacks.averaging.decay=0.8")


def test_the_average_is_what_is_exported_and_lies_on_the_manifold(averaged: Path) -> None:
    weights = load_file(averaged / "export" / "model.safetensors")
    saved = checkpoint.load(checkpoint.path_for(averaged, 24))
    assert torch.equal(weights["5.bases.k8"], saved["state_dict"]["model.5.bases.k8"])
    assert not torch.equal(weights["5.bases.k8"], saved["current_model_state"]["model.5.bases.k8"])
    assert error(weights["5.bases.k8"]) < 2e-6
    assert json.loads((averaged / "results.json").read_text())["metrics"]["test/accuracy"] > 0.5


def test_it_is_the_projected_mean(tmp_path: Path) -> None:
    """Of the last two steps, with SWA: the mean of the body, the polar factor of the mean of the bases."""
    words = ["trainer.max_steps=4", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=4"]
    swa = run(tmp_path / "swa", "callbacks=swa", "callbacks.averaging.start=0.5", *words)
    found = load_file(swa / "export" / "model.safetensors")
    steps = [checkpoint.load(checkpoint.path_for(swa, s))["current_model_state"] for s in (3, 4)]
    for name, value in found.items():
        a, b = (step[f"model.{name}"] for step in steps)
        if name.endswith("k8"):
            U, _, Vh = torch.linalg.svd((a + b).double(), full_matrices=False)
            torch.testing.assert_close(value, (U @ Vh).float(), rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(value, (a + b) / 2)


def test_an_interrupted_average_goes_on(averaged: Path) -> None:
    again = averaged.parent / "again"
    shutil.copytree(averaged, again)
    for file in [again / "results.json", *again.glob("checkpoints/step_00000024*")]:
        file.unlink()
    run(again, "callbacks=ema", "callbacks.averaging.decay=0.8", f"resume={again}")
    ends = [checkpoint.load(checkpoint.path_for(r, 24)) for r in (averaged, again)]
    for part in ("state_dict", "current_model_state"):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), (part, name)
    tables = [list(csv.DictReader((r / "metrics.csv").open(newline=""))) for r in (averaged, again)]
    assert [row["val/loss"] for row in tables[0]] == [row["val/loss"] for row in tables[1]]


def test_mistakes_are_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        assert cli.main([*WORDS, "callbacks=ema", "callbacks.averaging.decay=1.5"]) == 2
    assert "decay=1.5: expected a number between 0 and 1, or null" in capfd.readouterr().err
