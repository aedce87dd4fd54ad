"""A real but tiny run: the project's own parts on a few kB of text, a second per fit once everything is imported."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

TINY = (
    "data=text",
    "data.block_size=16",
    "data.batch_size=4",
    "data.global_batch_size=4",
    "data.val_fraction=0.2",
    "data.val_tokens=512",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_heads=2",
    "model.num_layers=1",
    "method.rank=4",
    "method.refresh_every=3",
    "optimizer.lr=0.01",
    "trainer=cpu",
    "trainer.log_every=1",
    "trainer.max_steps=10",
    "trainer.val_every=4",
    "trainer.checkpoint_every=3",
    "trainer.progress=off",
    "compare=null",
    "export=false",
)


@dataclass
class TinyRun:
    """Composes tiny configurations over one text and fits them into folders below one place."""

    root: Path
    text: Path

    def config(self, *overrides: str) -> DictConfig:
        from subspace_lab.app import compose_config

        words = self.words()
        if "method=none" in overrides:
            words = [word for word in words if not word.startswith("method.")]
        return compose_config([*words, f"paths.output_dir={self.root}", *overrides])

    def words(self) -> list[str]:
        """The overrides as they would be typed."""
        return [*TINY, f"data.files=[{self.text}]", f"paths.cache_dir={self.root}/cache"]

    def fit(self, folder: str, *overrides: str) -> Any:
        from subspace_lab.protocols.fit import Fit

        run_dir = self.root / folder
        run_dir.mkdir(exist_ok=True)
        return Fit().run(self.config(*overrides), run_dir, label=folder, resume_dir=run_dir)

    def rows(self, folder: str) -> list[dict[str, str]]:
        """The rows of metrics.csv without the columns that depend on the clock."""
        with (self.root / folder / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if "per_second" not in k and v} for row in csv.DictReader(file)]

    def weights(self, folder: str) -> dict[str, Any]:
        from subspace_lab.training import checkpoint

        newest = checkpoint.list_checkpoints(self.root / folder)[0]
        return dict(checkpoint.load(newest)["state_dict"])


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    text = tmp_path / "corpus.jsonl"
    lines = [
        f'{{"text": "document {i}: {"abcdefgh"[i % 8] * (i % 13)} the quick brown fox {i * i}"}}' for i in range(300)
    ]
    text.write_text("\n".join(lines) + "\n")
    return TinyRun(tmp_path, text)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """stop_at(step, where): ask for an interrupt as if a signal had come just after a step or inside a validation."""
    from lightning.pytorch import Callback, Trainer

    from subspace_lab import interrupt
    from subspace_lab.training.trainer import TrainerPlan

    class Ask(Callback):
        def __init__(self, step: int, where: str) -> None:
            self.step, self.where = step, where

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if self.where == "step" and trainer.global_step == self.step:
                interrupt.request.signal = 2

        def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if self.where == "validation" and trainer.global_step == self.step:
                interrupt.request.signal = 2

    create = TrainerPlan.create

    def arm(step: int, where: str = "step") -> None:
        def with_ask(self: TrainerPlan, **kwargs: Any) -> Trainer:
            kwargs["callbacks"] = [Ask(step, where), *kwargs["callbacks"]]
            return create(self, **kwargs)

        monkeypatch.setattr(TrainerPlan, "create", with_ask)

    def reset() -> None:
        interrupt.request.signal = None
        monkeypatch.setattr(TrainerPlan, "create", create)

    arm.reset = reset  # type: ignore[attr-defined]
    yield arm
    reset()
