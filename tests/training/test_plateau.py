"""The patience schedule in real runs on digits: when the learning rate falls, what stops it, what is kept."""

from __future__ import annotations

import contextlib
import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subspace_lab import cli
from subspace_lab.errors import UserError
from subspace_lab.training import checkpoint
from subspace_lab.training.callbacks.plateau import Plateau

# Too large a learning rate on few images: the validation loss goes up and down.
WORDS = [
    "method=none",
    "model=mlp",
    "data=digits",
    "protocol=fit",
    "compare=null",
    "optimizer=sgd",
    "optimizer.lr=0.8",
    "optimizer.momentum=0.0",
    "scheduler=constant",
    "callbacks=plateau",
    "callbacks.plateau.patience=2",
    "callbacks.plateau.min_lr=0.15",
    "data.batch_size=8",
    "data.train_fraction=0.1",
    "trainer.max_epochs=null",
    "trainer.max_steps=400",
    "trainer.val_every=4",
    "trainer.checkpoint_every=4",
    "trainer.keep_checkpoints=200",
    "trainer.progress=off",
    "trainer.log_every=1",
]


def run(folder: Path, *words: str, code: int = 0) -> Path:
    with contextlib.chdir(folder.parent):
        assert cli.main([*WORDS, *words, f"hydra.run.dir={folder}"]) == code
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def literal(losses: list[float], lr: float) -> tuple[list[float], int, bool]:
    """The release's loop over validations: the learning rate after each, which was best, whether it stopped there."""
    best, at, patience, rates = float("inf"), 0, 2, []
    for number, loss in enumerate(losses):
        if loss < best:
            best, at, patience = loss, number, 2
        else:
            patience -= 1
            if patience <= 0:
                lr /= 2
                if lr < 0.15:
                    return [*rates, lr * 2], at, True
                patience = 2
        rates.append(lr)
    return rates, at, False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("plateau") / "whole")


def test_it_follows_the_releases_loop_and_keeps_the_best_weights(whole: Path) -> None:
    rows = table(whole)
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    rates, best, stopped = literal(losses, 0.8)
    assert stopped and len(rates) == len(losses) and 0.2 in rates  # twice halved, then the end
    steps = [int(row["step"]) for row in rows if row["val/loss"]]
    used = {int(row["step"]): float(row["train/lr"]) for row in rows if row["train/lr"]}
    for number, step in enumerate(steps[:-1]):  # LambdaLR sets the rate anew at every step: it must not come back
        assert [used[step + i] for i in range(1, 5)] == pytest.approx([rates[number]] * 4)
    kept = load_file(whole / "export" / "model.safetensors")
    then = checkpoint.load(checkpoint.path_for(whole, steps[best]))["state_dict"]
    last = checkpoint.load(checkpoint.path_for(whole, steps[-1]))["state_dict"]
    assert all(torch.equal(kept[name], then[f"model.{name}"]) for name in kept)
    assert not all(torch.equal(kept[name], last[f"model.{name}"]) for name in kept)


def test_an_interrupted_run_goes_on_as_it_was(whole: Path) -> None:
    """From a checkpoint in which the rate has been halved once and the patience is not whole."""
    losses = [float(row["val/loss"]) for row in table(whole) if row["val/loss"]]
    rates = literal(losses, 0.8)[0]
    cut = 4 * (rates.index(0.4) + 2)
    again = whole.parent / "again"
    shutil.copytree(whole, again)
    (again / "results.json").unlink()
    for path in checkpoint.list_checkpoints(again):
        if checkpoint.step_of(path) > cut:
            path.unlink()
            for beside in path.parent.glob(f"{path.name}*"):
                beside.unlink()
    run(again, f"resume={again}")
    for column in ("val/loss", "train/lr", "train/loss"):
        assert [row[column] for row in table(again)] == [row[column] for row in table(whole)], column
    ends = [load_file(folder / "export" / "model.safetensors") for folder in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_new_fit_starts_anew() -> None:
    class Fitting:
        check_val_every_n_epoch = None
        limit_val_batches = 1.0

    plateau, fresh = Plateau(patience=3), Plateau(patience=3)
    plateau.load_state_dict({"best": 0.5, "left": 1, "done": True, "weights": {"w": torch.ones(1)}})
    plateau.setup(Fitting(), None, "fit")  # type: ignore[arg-type]
    assert plateau.state_dict() == fresh.state_dict()
    plateau.load_state_dict({"best": 0.5, "left": 1, "done": False, "weights": {}})
    plateau.setup(Fitting(), None, "test")  # type: ignore[arg-type]
    assert plateau.state_dict()["left"] == 1


def test_one_line_for_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "none", "trainer.val_every=null", code=2)
    assert "callbacks=plateau looks at every validation, and there is none" in capsys.readouterr().err
    for options in ({"patience": 0}, {"factor": 1.0}, {"min_lr": -1.0}):
        with pytest.raises(UserError, match=f"callbacks: {next(iter(options))}="):
            Plateau(**options)  # type: ignore[arg-type]
