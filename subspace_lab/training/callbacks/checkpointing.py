"""When checkpoints are written, and the exact place in the loop to which a resumed run returns.

A checkpoint always describes the state after a whole number of optimizer steps. If a validation is due after that
step, the file is written once the validation is done; only an interrupt writes it before, and says so inside
(`validation_due`), so that the resumed run begins with that validation. Lightning's own loop counters depend on the
hook they were saved in; they are rebuilt from the step count when a checkpoint is read, also for another number of
micro-batches per step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from subspace_lab.errors import UserError
from subspace_lab.training import checkpoint as files
from subspace_lab.training.callbacks.timing import Timing


class Checkpointing(Callback):
    """Writes checkpoints every `every` steps and at the end of training.

    Args:
        run_dir: the run folder.
        every: optimizer steps between checkpoints; 0 writes none but on an interrupt.
        timing: the clock to stop meanwhile.

    Attributes:
        start_step: optimizer steps before this fit: of the tasks before, in a sequence of them.
        validation_due: a validation belongs to the current step and has not finished.
        validated_at: the step after which the last validation ran, -1 before the first.
    """

    def __init__(self, run_dir: Path, every: int, timing: Timing) -> None:
        self.run_dir = run_dir
        self.every = every
        self.timing = timing
        self.start_step = 0
        self.validation_due = False
        self.validated_at = -1
        self._saved_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the validation that an interrupt had cut off."""
        if not self.validation_due:
            return
        # As Lightning's own loop does between two batches.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every `every`-th step unless a validation comes first."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        interval = trainer.val_check_batch
        self.validation_due = (
            isinstance(interval, int) and (batch_idx + 1) % interval == 0 and trainer.limit_val_batches != 0
        )
        if not self.validation_due:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation."""
        self.validation_due = False
        self.validated_at = trainer.global_step
        if trainer.state.fn == "fit":
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, from which a run with more steps continues."""
        if self.every and self._saved_at != trainer.global_step:
            self.save(trainer, must=True)

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self.every and self._saved_at != step and (step % self.every == 0 or step == trainer.max_steps):
            self.save(trainer, must=step == trainer.max_steps)

    def save(self, trainer: Trainer, *, must: bool) -> Path:
        """Write a checkpoint of the current step, on all ranks together; returns its path.

        Args:
            trainer: the running trainer.
            must: raise if it cannot be written; else say so and go on training.

        Raises:
            UserError: `must` and the disk is full or read-only.
        """
        for logger in trainer.loggers:
            logger.save()  # rows up to this step are on the disk before a checkpoint claims the step
        path = files.path_for(self.run_dir, trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved_at = trainer.global_step
        problem = trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "problem", None))
        self.timing.restart()
        if problem is not None:
            if must:
                raise UserError(problem, hint="free some space, then continue with `subspace-lab resume`")
            if trainer.is_global_zero:
                print(f"warning: {problem}; training goes on", file=sys.stderr)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is still owed to the saved step."""
        return {"validation_due": self.validation_due, "validated_at": self.validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember an owed validation."""
        self.validation_due = bool(state_dict["validation_due"])
        self.validated_at = int(state_dict["validated_at"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the loop between two batches and drop logged rows of steps that will be run again."""
        step = int(checkpoint["global_step"])
        self._saved_at = step
        canonical_loops(checkpoint["loops"]["fit_loop"], step - self.start_step, trainer.accumulate_grad_batches)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if hasattr(logger, "drop_rows_after"):
                    logger.drop_rows_after(step)


def canonical_loops(state: dict[str, Any], step: int, accumulation: int) -> None:
    """Rewrite Lightning's fit-loop counters as they stand in `on_train_batch_end` of the last micro-batch of `step`.

    Args:
        state: the checkpoint's `loops.fit_loop`, changed in place.
        step: finished optimizer steps of this fit.
        accumulation: micro-batches per step from now on.
    """
    batches = step * accumulation
    counters = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    progress = state["epoch_loop.batch_progress"]
    progress.update(total=dict(counters), current=dict(counters), is_last_batch=False)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    validation = state["epoch_loop.val_loop.batch_progress"]
    zero = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    validation.update(total=dict(zero), current=dict(zero), is_last_batch=False)
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    state["epoch_progress"].update(total=dict(epoch), current=dict(epoch))
