"""A callback that asks one process to stop, as a signal would."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from subspace_lab import interrupt


class Ask(Callback):
    """Sets the flag of an interrupt.

    Args:
        rank: of the process that is asked.
        step: after which.
    """

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Ask, once."""
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            interrupt.request.signal = 10
