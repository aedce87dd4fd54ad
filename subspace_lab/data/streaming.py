"""Corpora too large to tokenise first: read while training, at an exact position that can be resumed.

The text comes through Hugging Face `datasets` in streaming mode; the shuffling is ours, because theirs loses
its buffer when a run is resumed. Shards (files) are read in an order that depends on (seed, epoch); within a
shard, windows of `shuffle_buffer` documents are permuted by (seed, epoch, shard, window). So a position is
five integers, and going on from it reads at most one shard from its start. The training script of GaLore
shuffles shards and a buffer of 1000 documents with seed 42: the same amount of mixing, not the same order.

Each of the world_size × workers streams takes its own shards; where there are fewer shards than streams, its
own documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from subspace_lab.data.documents import hash_text
from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.order import mix
from subspace_lab.data.packing import IGNORE, Batch, Packing
from subspace_lab.data.position import Position
from subspace_lab.data.tokenization import Ids, Tokenizer
from subspace_lab.errors import UserError, did_you_mean

_ENCODE = 64  # documents tokenised together: enough for a tokenizer's threads, too few to stall a batch


@dataclass(frozen=True)
class StreamSource:
    """One split of a hub data set, or some JSON files, read as a stream.

    Args:
        path, config, split: arguments of `datasets.load_dataset`.
        data_files: JSON files instead; `path` is then `json`.
        text_key: the field that holds the text.
        tried, hint: for the error message: what was looked for before the hub, and what to type instead.
    """

    path: str = "json"
    config: str | None = None
    data_files: tuple[str, ...] = ()
    split: str = "train"
    text_key: str = "text"
    tried: str = ""
    hint: str = "data.files=[FILE.jsonl.gz] reads local files"

    @property
    def name(self) -> str:
        """What is read, for messages and records."""
        folder = f"{self.path}/{self.config}" if self.config else self.path
        return ", ".join(self.data_files) or f"{folder}:{self.split}"

    def open(self) -> Any:
        """The `datasets.IterableDataset`.

        Raises:
            UserError: the hub cannot be reached or has no such data.
        """
        try:
            if not self.data_files:
                require_network()
            import datasets

            files = list(self.data_files) or None
            split = "train" if files else self.split
            return datasets.load_dataset(self.path, self.config, data_files=files, split=split, streaming=True)
        except Exception as error:
            raise hub_error(self.tried, self.name, error, self.hint) from error

    def shard(self, dataset: Any, index: int, skip: int, window: int) -> Iterator[list[str]]:
        """Texts of one shard in lists of `window`, after `skip` documents."""
        # iter(batch_size) and not a plain loop: that one divides the shards once more among DataLoader
        # workers.
        for rows in dataset.shard(num_shards=dataset.num_shards, index=index).skip(skip).iter(batch_size=window):
            yield self._column(rows)

    def _column(self, rows: dict[str, list[Any]]) -> list[str]:
        if self.text_key not in rows:
            near = did_you_mean(self.text_key, rows)
            raise UserError(
                f"{self.name} has no field '{self.text_key}', it has {', '.join(rows)}",
                hint=near or "data.text_key=NAME",
            )
        return [text for text in rows[self.text_key]]

    def __iter__(self) -> Iterator[str]:
        """All texts in their own order (validation)."""
        for rows in self.open().iter(batch_size=256):
            yield from (text for text in self._column(rows) if text and text.strip())

    def identity(self) -> str:
        """Hash of what is read; a hub data set is taken to stay as it is."""
        return hash_text(repr([self.name, self.text_key]))

    def describe(self) -> dict[str, Any]:
        """What is read, and that it is not kept."""
        return {"source": self.name, "streamed": True}


@dataclass
class TextStream:
    """Endless batches of one stream of several, from any position.

    Args:
        stream, n_streams: which share of the corpus this one takes.
    """

    source: StreamSource
    tokenizer: Tokenizer
    batch_size: int
    block_size: int
    packing: Packing
    seed: int
    shuffle_buffer: int
    stream: int = 0
    n_streams: int = 1
    _dataset: Any = field(default=None, repr=False)

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield each batch with the position after it."""
        return self._packed(position) if self.packing == "pack" else self._padded(position)

    def _packed(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        need = self.batch_size * self.block_size
        parts: list[Ids] = []
        have, start = 0, position.token
        for here, ids in self._documents(position):
            while start < len(ids):
                part = ids[start : start + need - have]
                parts.append(part)
                start += len(part)
                have += len(part)
                if have == need:
                    tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64).reshape(self.batch_size, -1))
                    yield {"input_ids": tokens, "labels": tokens.clone()}, replace(here, token=start)
                    parts, have = [], 0
            start = 0

    def _padded(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        rows: list[Ids] = []
        for here, ids in self._documents(position):
            row = ids[: self.block_size].copy()
            row[-1] = self.tokenizer.eos_id
            rows.append(row)
            if len(rows) == self.batch_size:
                tokens = np.full((self.batch_size, self.block_size), self.tokenizer.pad_id, dtype=np.int64)
                real = np.arange(self.block_size) < np.array([len(row) for row in rows])[:, None]
                tokens[real] = np.concatenate(rows)
                batch = {
                    "input_ids": torch.from_numpy(tokens),
                    "labels": torch.from_numpy(np.where(real, tokens, IGNORE)),
                    "attention_mask": torch.from_numpy(real.astype(np.int64)),
                }
                yield batch, replace(here, document=here.document + 1)
                rows = []

    def _documents(self, position: Position) -> Iterator[tuple[Position, Ids]]:
        """Tokenised documents, each ending in eos, with the position of its first token."""
        for here, texts in self._windows(position):
            for first in range(here.document, len(texts), _ENCODE):
                for offset, ids in enumerate(self.tokenizer.encode(texts[first : first + _ENCODE]), first):
                    if not len(ids):
                        continue
                    yield (
                        replace(here, document=offset, token=0),
                        np.append(ids, np.uint32(self.tokenizer.eos_id)),
                    )

    def _windows(self, position: Position) -> Iterator[tuple[Position, list[str]]]:
        if self._dataset is None:
            self._dataset = self.source.open()
        n_shards = int(self._dataset.num_shards)
        own_shards = n_shards >= self.n_streams
        here = replace(position, token=0)
        while True:
            order = permutation(n_shards, self.seed, here.epoch)
            mine = order[self.stream :: self.n_streams] if own_shards else order
            found = here.shard > 0 or here.window > 0
            for index in range(here.shard, len(mine)):
                shard = int(mine[index])
                here = replace(here, shard=index)
                for texts in self.source.shard(
                    self._dataset, shard, here.window * self.shuffle_buffer, self.shuffle_buffer
                ):
                    chosen = permutation(len(texts), self.seed, here.epoch, shard, here.window)
                    if not own_shards:
                        chosen = chosen[self.stream :: self.n_streams]
                    kept = [texts[i] for i in chosen]
                    found = found or any(kept)
                    yield here, [text if text and text.strip() else "" for text in kept]
                    here = replace(here, window=here.window + 1, document=0)
                here = replace(here, window=0, document=0)
            if not found:
                raise UserError(f"{self.source.name} holds no text for stream {self.stream + 1} of {self.n_streams}")
            here = Position(epoch=here.epoch + 1)


class StreamDataset(IterableDataset[tuple[Batch, dict[str, int]]]):
    """A process' streams for a `DataLoader`: worker w goes on with the stream of batch `start + w`."""

    def __init__(self, streams: list[TextStream], positions: list[dict[str, int]], start: int) -> None:
        self._streams, self._positions, self._start = streams, positions, start

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        info = get_worker_info()
        turn = (self._start + (info.id if info is not None else 0)) % len(self._positions)
        for batch, position in self._streams[turn].batches(Position(**self._positions[turn])):
            yield batch, asdict(position)


def permutation(n: int, *key: int) -> list[int]:
    """A permutation of range(n) that depends on `key` alone."""
    generator = torch.Generator().manual_seed(mix(*key))
    return [int(i) for i in torch.randperm(n, generator=generator)]
