"""A search by Optuna: what it minimises, what failed, and how it goes on, without a study on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from subspace_lab.sweeps import manifest

WORDS = ("-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(0.001,1.0))", "hydra.sweeper.n_jobs=1")


def bowl(cfg: DictConfig) -> float:
    lr = float(cfg.optimizer.lr)
    if lr > 0.1:
        raise ValueError("too large")
    return abs(lr - 0.06) if lr > 0.02 else float("nan")


def figures(root: Path) -> list[str]:
    (sweep,) = root.glob("outputs/*/sweeps/*")
    known = manifest.read(sweep)
    assert known is not None and known.swept == ["optimizer.lr"]
    return [cell.overrides[0] for cell in known.cells]


@pytest.mark.slow
def test_failed_and_diverged_trials_do_not_end_a_search(command, training, tmp_path: Path) -> None:
    training.figure = bowl
    answer = command(*WORDS, "hydra.sweeper.n_trials=6")
    rates = [lr for _, _, lr in training.cells]
    assert len(rates) == 6 and any(lr > 0.1 for lr in rates), "the sampler is seeded with the run's seed: 0"
    assert answer.code == 1 and f"{sum(lr > 0.1 for lr in rates)} of 6 cells failed" in answer.err
    assert "Traceback" not in answer.err
    best = min((lr for lr in rates if 0.02 < lr < 0.1), key=lambda lr: abs(lr - 0.06))
    assert f"best val/loss: optimizer.lr={best:.12g}" in answer.out
    plots = next(tmp_path.glob("outputs/*/sweeps/*/plots"))
    assert (plots / "val_loss_history.png").is_file()
    training.cells.clear()
    command(*WORDS, "hydra.sweeper.n_trials=6", "resume=auto")
    assert training.cells and all(lr > 0.1 for _, _, lr in training.cells), "only what failed"
    training.cells.clear()
    command(*WORDS, "hydra.sweeper.n_trials=8", "resume=auto")
    again = [lr for _, _, lr in training.cells]
    assert [lr for lr in again if lr not in rates] == again[-2:], "the first six trials are the same, two are new"
    assert len(figures(tmp_path)) == 8


@pytest.mark.slow
def test_the_search_file(command, training, tmp_path: Path) -> None:
    training.figure = lambda cfg: float(cfg.method.rank)
    answer = command("hparams_search=lr_optuna", "hydra.sweeper.n_trials=3")
    assert answer.code == 0, answer.err
    assert len(training.cells) == 3 and all(0.0001 <= lr <= 0.1 for _, _, lr in training.cells)
    sweep = next(tmp_path.glob("outputs/*/sweeps/*"))
    known = manifest.read(sweep)
    assert known is not None and known.swept == ["optimizer.lr", "method.rank"] and known.sweeper == "OptunaSweeper"
    assert "best_value" in (sweep / "optimization_results.yaml").read_text()


@pytest.mark.slow
def test_nothing_but_failures_is_no_traceback(command, training) -> None:
    def fails(cfg: DictConfig) -> float:
        raise ValueError("always")

    training.figure = fails
    answer = command(*WORDS, "hydra.sweeper.n_trials=2")
    assert answer.code == 1 and "2 of 2 cells failed" in answer.err and "bug" not in answer.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "optimizer.lr=interval(0.001,0.1)"], "hydra/sweeper=optuna"),
        ([*WORDS, "hydra.sweeper.direction=maximize"], "expected minimize"),
        (["-m", "hydra/sweeper=optuna"], "needs a key to vary"),
        ([*WORDS[:2], "method=choice(galore,galor)"], "did you mean 'galore'"),
        ([*WORDS, "hydra.sweeper.n_trails=3"], "unknown key"),
    ],
)
def test_a_search_that_cannot_work_is_one_line(command, words: list[str], expected: str, tmp_path: Path) -> None:
    answer = command(*words)
    assert answer.code == 2 and expected in answer.err and len(answer.err.splitlines()) == 1, answer.err
    assert not list(tmp_path.rglob("sweep.json"))


def test_without_optuna_one_line_says_what_to_install(command, monkeypatch: pytest.MonkeyPatch) -> None:
    sweepers = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(sweepers, "optuna.yaml")
    for words in (WORDS, ("hparams_search=lr_optuna",)):
        answer = command(*words)
        assert answer.code == 2 and "pip install 'subspace-lab[optuna]'" in answer.err, answer.err
        assert len(answer.err.splitlines()) == 1
