"""Where training stands in the data: what a checkpoint keeps, also for another number of processes."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a stream stands: the next token it gives. Plain integers, so a checkpoint holds no objects.

    Attributes:
        epoch: passes over the stream's shards.
        shard: index into this epoch's order of shards.
        window: window within the shard.
        document: index into the window's permutation.
        token: tokens of that document already given.
    """

    epoch: int = 0
    shard: int = 0
    window: int = 0
    document: int = 0
    token: int = 0


@dataclass
class TrainPosition:
    """The number of batches consumed and, for a streamed corpus, the position of each stream of this process.

    A loader fetches ahead of the training step; what it has fetched waits in `pending` until the step reports
    it used.

    Args:
        batch_size: rows per process and batch.
        n_streams: streams of this process (one per worker); 0 for local data, whose position is the count
            alone.
    """

    batch_size: int
    n_streams: int = 0
    rank: int = 0
    world_size: int = 1
    consumed: int = 0
    streams: list[dict[str, int]] = field(init=False)
    pending: deque[dict[str, int]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.streams = [asdict(Position()) for _ in range(self.n_streams)]

    def consume(self) -> None:
        """Count one batch as used."""
        if self.n_streams:
            self.streams[self.consumed % self.n_streams] = self.pending.popleft()
        self.consumed += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; streamed data has a position per process, so all processes call this together."""
        state: dict[str, Any] = {
            "batches": self.consumed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }
        if self.n_streams:
            everyone: list[Any] = [list(self.streams)]
            if self.world_size > 1:
                everyone = [None] * self.world_size
                torch.distributed.all_gather_object(everyone, self.streams)
            state["streams"] = everyone
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the same row of the training sequence; exactly so unless a warning says otherwise."""
        now = self.batch_size * self.world_size
        rows = state["batches"] * state["batch_size"] * state["world_size"]
        self.consumed, extra = divmod(rows, now)
        self.pending.clear()
        if extra:
            log.warning("The checkpoint stands inside a batch of %d rows: %d rows are read again.", now, extra)
        saved = state.get("streams")
        if not self.n_streams or saved is None:
            return
        if [len(own) for own in saved] == [self.n_streams] * self.world_size:
            self.streams = [dict(position) for position in saved[self.rank]]
            return
        epoch = 1 + max(position["epoch"] for own in saved for position in own)
        self.streams = [asdict(Position(epoch=epoch)) for _ in range(self.n_streams)]
        log.warning(
            "The stream was read by %d processes with %d workers each, now by %d with %d: "
            "starting a newly shuffled pass over it.",
            len(saved),
            len(saved[0]),
            self.world_size,
            self.n_streams,
        )
