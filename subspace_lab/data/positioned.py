"""A data module that knows where it stands: what every data set's checkpointing has in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningDataModule

from subspace_lab.data.position import TrainPosition

log = logging.getLogger(__name__)


class PositionedDataModule(LightningDataModule):
    """Counts consumed training batches and carries the count through checkpoints.

    Args:
        batch_size: rows or examples per process and batch.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._rank, self._world_size = 0, 1
        self._position = TrainPosition(batch_size)
        self._saved: dict[str, Any] | None = None

    @property
    @abstractmethod
    def _is_open(self) -> bool:
        """Whether the data has been found."""

    @abstractmethod
    def _fingerprint(self) -> str:
        """Hash of what decides the sequence of training batches."""

    def _streams(self) -> int:
        """Streams of this process; 0 for data on the disk or in memory."""
        return 0

    def _start(self) -> None:
        """Stand at the first batch, or where `load_state_dict` said before there was data."""
        self._position = TrainPosition(self.batch_size, self._streams(), self._rank, self._world_size)
        saved, self._saved = self._saved, None
        if saved is not None:
            self.load_state_dict(saved)

    def batch_consumed(self) -> None:
        """Count one training micro-batch as used: call once after each, in order."""
        self._position.consume()

    def state_dict(self) -> dict[str, Any]:
        """Position of the next training batch, as plain numbers; after `setup`.

        A streamed corpus has a position per process: with several processes all of them must call this together.
        """
        return {**self._position.state_dict(), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; unless streamed, also with another batch size or process count."""
        if not self._is_open:
            self._saved = state_dict
            return
        if state_dict["fingerprint"] != self._fingerprint():
            log.warning(
                "The training data, its order or its tokenizer differs from the checkpoint's: "
                "continuing at the same position in what there is now."
            )
        self._position.load_state_dict(state_dict)
