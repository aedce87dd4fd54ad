"""Where a sequence of tasks stands: what a checkpoint keeps besides model, optimizer and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


@dataclass
class Standing:
    """The tasks behind a run and the one it is in.

    Attributes:
        task: the one that is trained, from 0.
        start_step: optimizer steps before it.
        finished: its training has ended, before its last step if a callback stopped it.
        matrix: a row of accuracies for each task behind.
        robust: likewise, under attack; empty without.
        ranks: protected directions of each layer after each task behind.
        seconds: training time of each task behind, and of what followed its training.
    """

    task: int = 0
    start_step: int = 0
    finished: bool = False
    matrix: list[list[float]] = field(default_factory=list)
    robust: list[list[float]] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)


class TaskProgress(Callback):
    """Carries the standing and the method's state through checkpoints.

    Args:
        standing: kept up to date by the protocol.
        method_state: gives the method's state_dict.
        prepare: gets method and model ready; called once the processes of a run know of one another, before the
            optimizer is built and weights are restored.
    """

    def __init__(
        self, standing: Standing, method_state: Callable[[], dict[str, Any]], prepare: Callable[[Trainer], None]
    ) -> None:
        self.standing = standing
        self._method_state, self._prepare = method_state, prepare

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get ready for training."""
        if stage == "fit":
            self._prepare(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task is being trained."""
        self.standing.finished = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The task's training is over, whether by steps or by a callback."""
        self.standing.finished = True

    def state_dict(self) -> dict[str, Any]:
        """Return standing and method state; the protocol restores both, before there is a trainer."""
        return {"standing": asdict(self.standing), "method": self._method_state()}
