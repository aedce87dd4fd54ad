"""`protocol=dqn` and `protocol=evolution` as the command line runs them: figures, resumption bit for bit, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.outcome import Outcome

pytest.importorskip("gymnasium")

DQN = ["protocol=dqn", "data=cartpole", "model=policy_fc", "trainer.max_steps=240", "trainer.val_every=60"]
DQN += [
    "protocol.learner.batch_size=64",
    "protocol.learner.warmup=80",
    "protocol.learner.memory=200",
    "protocol.learner.target_every=50",
]
EVOLUTION = ["protocol=evolution", "data=cartpole", "model=policy_fc", "trainer.max_steps=6", "trainer.val_every=2"]
EVOLUTION += ["protocol.learner.population=6", "data.max_episode_steps=30", "data.best_return=null"]
COMMON = ["method=none", "trainer=cpu", "trainer.log_every=1", "trainer.checkpoint_every=0", "trainer.progress=off"]
COMMON += ["protocol.validation_episodes=3", "protocol.test_episodes=5", "scheduler=constant", "compare=null"]
SUBSPACE = ["method=intrinsic_dimension", "method.d=7"]


def compose(tmp_path: Path, words: list[str]) -> DictConfig:
    from subspace_lab.app import compose_config
    from subspace_lab.schema import validate

    cfg = compose_config([*COMMON, *words, f"paths.output_dir={tmp_path}"])
    validate(cfg)
    return cfg


def play(folder: Path, words: list[str]) -> Outcome:
    from subspace_lab import build

    folder.mkdir(exist_ok=True)
    cfg = compose(folder, words)
    return build.instantiate(cfg.protocol).run(cfg, folder, label="test", resume_dir=folder)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "export" / "model.safetensors")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """A signal that arrives during the given piece of learning."""
    asked = {"times": 0}

    def requested() -> int | None:
        asked["times"] += 1
        return 15 if asked["times"] == pieces else None

    monkeypatch.setattr(interrupt, "requested", requested)


@pytest.mark.parametrize("words", [DQN, EVOLUTION, [*SUBSPACE, *DQN], [*SUBSPACE, *EVOLUTION]])
def test_an_interrupted_run_ends_bit_for_bit_as_the_whole_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = play(whole, words)
    interrupt_after(monkeypatch, 4)
    with pytest.raises(Interrupted, match=f"continue with: subspace-lab resume {cut}"):
        play(cut, words)
    assert not interrupt.request.armed
    second = play(cut, [*words, "resume=auto"])
    assert second.metrics == first.metrics
    for name, tensor in exported(whole).items():
        assert torch.equal(exported(cut)[name], tensor)
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert {"val/return", "test/return", "train/return"} <= first.metrics.keys()
    assert first.timing["cpu_seconds"] > 0
    if "method.d=7" in words:
        assert (first.metrics["subspace/d"], first.metrics["subspace/D"]) == (7, 562)


def test_the_best_policy_is_the_one_that_is_tested(tmp_path: Path) -> None:
    outcome = play(tmp_path, EVOLUTION)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("val/return")
    validated = [float(row[column]) for row in rows[1:] if row[column]]
    assert outcome.metrics["val/return"] == max(validated)
    assert outcome.metrics[outcome.objective] == -max(validated)


def test_training_stops_when_nothing_better_is_possible(tmp_path: Path) -> None:
    outcome = play(tmp_path, [*EVOLUTION, "data.best_return=5"])
    assert outcome.timing["steps"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=stdlib_text", "model=llama_tiny"], "learns in an environment"),
        (["protocol.test_episodes=0"], "protocol.test_episodes=0"),
        (["trainer.strategy=ddp", "trainer.devices=2"], "one process"),
    ],
)
def test_what_does_not_fit_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    kept = [word for word in EVOLUTION if not word.startswith("data.") or words[0].startswith(("protocol", "trainer"))]
    with pytest.raises(UserError, match=message):
        play(tmp_path, [*kept, *words])


@pytest.mark.slow
def test_the_command_line(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = [word for word in [*COMMON, *DQN] if not word.startswith("method=")]
    from subspace_lab.cli import main

    assert main([*words, "method=none", f"hydra.run.dir={tmp_path}/run"]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["status"] == "completed"
    assert found["data"]["environment"] == "CartPole-v1"
