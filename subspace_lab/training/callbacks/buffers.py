"""Running statistics of normalisation layers are those of the first process, wherever a model is evaluated."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SharedBuffers(Callback):
    """Has every process go on with the first one's buffers.

    DDP hands them out at the start of each forward pass, so that after the last step each process has taken in a batch
    of its own, and Lightning not before the next evaluation; FSDP never does: its processes would judge different
    models, of which a checkpoint holds one.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate one model."""
        self._share(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test, save and go on with one model."""
        self._share(pl_module)

    def _share(self, pl_module: LightningModule) -> None:
        for buffer in pl_module.buffers():
            torch.distributed.broadcast(buffer.data, src=0)
