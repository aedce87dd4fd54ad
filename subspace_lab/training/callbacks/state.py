"""Everything outside model and optimizer that an exact resume needs: random generators and the position in the data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from subspace_lab.data.order import mix
from subspace_lab.training import rng


class RunState(Callback):
    """Counts consumed batches for the data module and carries the random generators through checkpoints.

    The generators are restored at the start of the first batch after a resume: whatever was drawn while the run was
    being rebuilt (a data loader's seed, say) is undone by then. Validation draws too (each new iterator takes a
    seed), so the state is put back after it: how often a run validates does not change how it trains.

    Processes build the same model from the same seed and draw their own numbers from the first step on, or all would
    drop the same units.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every process but the first its own generators, unless a checkpoint has them."""
        if trainer.global_rank and self._to_restore is None:
            rng.seed(mix(torch.initial_seed(), trainer.global_rank))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the generators back where the checkpoint, or the batch before the validation, had left them."""
        if self._to_restore is not None:
            rng.set_state(self._to_restore)
            self._to_restore = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the data that one more of its batches was used (not merely fetched ahead)."""
        trainer.datamodule.batch_consumed()  # type: ignore[attr-defined]
        # Set before any callback that validates, saves or stops, and consumed by the next batch: one copy of 5 kB on
        # the host.
        self._to_restore = rng.get_state() if self._validation_follows(trainer) else None

    @staticmethod
    def _validation_follows(trainer: Trainer) -> bool:
        interval = trainer.val_check_batch
        return isinstance(interval, int) and (trainer.fit_loop.total_batch_idx + 1) % interval == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states of every process."""
        mine = self._to_restore if self._to_restore is not None else rng.get_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"rng": [mine]}
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return {"rng": everyone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this process's state for the first batch; processes that are new seed themselves."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        states = state_dict["rng"]
        self._to_restore = states[rank] if rank < len(states) else None
