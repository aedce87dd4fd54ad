"""Ctrl-C, SIGTERM and preemption signals: save at the next step boundary, on all ranks, and say how to continue.

The handlers (subspace_lab.interrupt) only set a flag. Here it is looked at after each optimizer step and each
validation batch, and the ranks agree on it first: one rank inside a barrier while another is in its backward pass
would hang.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted
from subspace_lab.training.callbacks.checkpointing import Checkpointing


class InterruptWatch(Callback):
    """Ends a run cleanly when a signal asked for it.

    Args:
        checkpointing: writes the checkpoint.
        resume_dir: the folder to name in `subspace-lab resume …` (of the whole run, when a baseline is being trained).
    """

    def __init__(self, checkpointing: Checkpointing, resume_dir: Path) -> None:
        self.checkpointing = checkpointing
        self.resume_dir = resume_dir
        self._sigterm: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember our SIGTERM handler before Lightning replaces it by one that enters a collective."""
        if threading.current_thread() is threading.main_thread():
            self._sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a signal waits for the end of the step."""
        if threading.current_thread() is threading.main_thread() and self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)
        interrupt.request.armed = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a whole step if any rank was asked to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation, which the resumed run starts over; several processes wait for its end."""
        if trainer.world_size == 1 and trainer.state.fn == "fit":
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal acts at once again."""
        interrupt.request.armed = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A signal acts at once again."""
        interrupt.request.armed = False

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = interrupt.requested() is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        self.checkpointing.save(trainer, must=True)
        raise Interrupted(
            f"interrupted after step {trainer.global_step} of {trainer.max_steps}, everything is saved; "
            f"continue with: subspace-lab resume {self.resume_dir}"
        )
