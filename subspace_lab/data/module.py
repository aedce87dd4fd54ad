"""`TextDataModule`: what the `data` group builds and Lightning drives."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace_lab.data.cache import Limit, TokenStore, open_or_build
from subspace_lab.data.corpora import Corpus, Dataset, Request, resolve
from subspace_lab.data.documents import hash_text
from subspace_lab.data.loaders import TrainBatches, TrainLoader, ValidationBatches, ValidationLoader
from subspace_lab.data.order import EpochOrder
from subspace_lab.data.packing import Batch, PackedRows, Packing, PaddedRows, Rows
from subspace_lab.data.positioned import PositionedDataModule
from subspace_lab.data.streaming import StreamDataset, StreamSource, TextStream
from subspace_lab.data.tokenization import Tokenizer
from subspace_lab.data.tokenizer_loading import load_tokenizer
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.training.tasks import Task


class TextDataModule(PositionedDataModule):
    """Text as batches of token rows for a causal language model.

    Batches are `{"input_ids", "labels"}`, int64 (batch_size, block_size), in pad mode also `attention_mask`;
    labels are not shifted and -100 on padding. Training is endless; its position counts batches *consumed*
    (`batch_consumed`), not batches fetched.

    Args:
        dataset: which corpus; see `corpora`.
        tokenizer: `bytes`, a hub name, a tokenizer.json, a sentencepiece .model, or a folder with either or
            vocab.json + merges.txt.
        block_size: tokens per row.
        batch_size: rows per process and step.
        global_batch_size: rows per optimizer step over all processes; the trainer reaches it by accumulation.
            Null: batch_size each.
        packing: `pack` joins documents with eos and cuts; `pad` puts one document, cut or filled up, in a
            row.
        files: paths, folders or globs of text, .json or .jsonl, each also .gz.
        val_files: the same for validation; null holds out `val_fraction` of the documents (whole files of
            plain text).
        text_key: field of a JSON document that holds its text.
        val_fraction: share of documents held out where the corpus has no validation part, in (0, 1).
        val_tokens: validate on the first so many tokens only; null takes all there is.
        streaming: null reads what is on disk, tokenised once, and streams from the hub what is not; true
            always streams; false never goes to the hub.
        shuffle_seed: order of the training rows; null takes the run's seed.
        shuffle_buffer: documents per shuffled window of a stream.
        num_workers: processes that prepare batches. A streamed run must be resumed with as many as it was
            started with.
        data_dir: where prepared data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where tokens are kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.
    """

    has_test = False

    def __init__(
        self,
        dataset: Dataset = "stdlib_text",
        tokenizer: str = "bytes",
        block_size: int = 128,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        packing: Packing = "pack",
        files: str | Sequence[str] | None = None,
        val_files: str | Sequence[str] | None = None,
        text_key: str = "text",
        val_fraction: float = 0.05,
        val_tokens: int | None = None,
        streaming: bool | None = None,
        shuffle_seed: int | None = None,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size)
        _at_least(2, block_size=block_size)
        _at_least(1, batch_size=batch_size, global_batch_size=global_batch_size, val_tokens=val_tokens)
        _at_least(1, shuffle_buffer=shuffle_buffer)
        _at_least(0, num_workers=num_workers)
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction={val_fraction}: expected a number between 0 and 1")
        self.dataset, self.block_size = dataset, block_size
        self.global_batch_size = global_batch_size
        self._packing: Packing = packing
        self._val_tokens, self._num_workers = val_tokens, num_workers
        self._shuffle_seed, self._shuffle_buffer = shuffle_seed, shuffle_buffer
        self._data_dir = Path(data_dir or os.environ.get("SUBSPACE_DATA") or "data").expanduser()
        cache = cache_dir or os.environ.get("SUBSPACE_CACHE") or "~/.cache/subspace-lab"
        self._cache_dir = Path(cache).expanduser()
        self._request = Request(
            dataset, files, val_files, text_key, val_fraction, streaming, self._data_dir, self._cache_dir
        )
        self._tokenizer_name = tokenizer
        self._seed = shuffle_seed or 0
        self._corpus: Corpus | None = None
        self._train_store: TokenStore | None = None
        self._val_store: TokenStore | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when first asked for."""
        return load_tokenizer(self._tokenizer_name, self._data_dir)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id in any batch: the embedding's rows."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The id between documents."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""
        return self.tokenizer.pad_id

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token of the validation text (separators are tokens); None before `setup`.

        Bits per byte is the mean loss in nats per token, divided by ln 2 and by this.
        """
        return None if self._val_store is None else self._val_store.bytes_per_token(self._val_tokens)

    @property
    def train_rows(self) -> int | None:
        """Rows of one pass over the training text; None while streaming. After `setup`."""
        return None if self._train_store is None else len(self._rows(self._train_store))

    def task(self) -> Task:
        """What is to be learnt: the next token. After `setup`."""
        from subspace_lab.training.tasks import LanguageModeling

        return LanguageModeling(self.bytes_per_token)

    def model_arguments(self) -> dict[str, Any]:
        """`data_vocab_size`, one more than the largest token id."""
        return {"data_vocab_size": self.vocab_size}

    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros in the shape of a training batch, and that shape in words."""
        tokens = torch.zeros(self.batch_size, self.block_size, dtype=torch.int64)
        return {"input_ids": tokens, "labels": tokens}, f"{self.batch_size} × {self.block_size} tokens"

    def configure(self, rank: int, world_size: int, seed: int) -> None:
        """Say which process this is; before `setup`."""
        self._rank, self._world_size = rank, world_size
        self._seed = seed if self._shuffle_seed is None else self._shuffle_seed
        if self._corpus is not None:
            self._start()

    def prepare_data(self) -> None:
        """Find the text and tokenise what is not in the cache; several processes may call this at once."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the token cache (making it if `prepare_data` has not)."""
        self._open()
        if self._train_store is not None and len(self._rows(self._train_store)) == 0:
            raise UserError(
                f"the training text has {len(self._train_store.tokens)} tokens, less than one row",
                hint="a smaller data.block_size",
            )

    def _open(self) -> None:
        if self._val_store is not None:
            return
        corpus = self._corpus = resolve(self._request)
        if not isinstance(corpus.train, StreamSource):
            self._train_store = open_or_build(
                corpus.train, self.tokenizer, self._cache_dir / "tokens", f"{self.dataset}-train"
            )
        limit = None
        if isinstance(corpus.validation, StreamSource):
            row = self.block_size if self._packing == "pad" else None
            limit = Limit(self._val_tokens, row) if self._val_tokens is not None else None
        self._val_store = open_or_build(
            corpus.validation, self.tokenizer, self._cache_dir / "tokens", f"{self.dataset}-val", limit
        )
        self._start()

    def _streams(self) -> int:
        streamed = self._corpus is not None and isinstance(self._corpus.train, StreamSource)
        return max(1, self._num_workers) if streamed else 0

    def _rows(self, store: TokenStore, validation: bool = False) -> Rows:
        limit = self._val_tokens if validation else None
        if self._packing == "pad":
            return PaddedRows(store, self.block_size, self.pad_id, self.eos_id, limit)
        return PackedRows(store, self.block_size, self.pad_id, keep_tail=validation, max_tokens=limit)

    def train_dataloader(self) -> TrainLoader:
        """Endless batches from the current position on."""
        if self._val_store is None:
            raise RuntimeError("setup() comes before train_dataloader()")
        if self._train_store is None:
            return TrainLoader(
                lambda: self._position.consumed, self._stream_from, self._receive_streamed, self._num_workers
            )
        rows = self._rows(self._train_store)
        batches = TrainBatches(rows, EpochOrder(len(rows), self._seed), self.batch_size, self._rank, self._world_size)
        return TrainLoader(lambda: self._position.consumed, lambda _: batches, _as_is, self._num_workers)

    def val_dataloader(self) -> ValidationLoader:
        """All validation rows of this process, in order; the last batch may be short."""
        if self._val_store is None:
            raise RuntimeError("setup() comes before val_dataloader()")
        rows = self._rows(self._val_store, validation=True)
        return ValidationLoader(ValidationBatches(rows, self.batch_size, self._rank, self._world_size))

    def train_eval_dataloader(self) -> ValidationLoader:
        """All training rows of this process once, in order; a UserError for streamed text."""
        if self._train_store is None:
            raise UserError("protocol.train_accuracy=true needs text on the disk, not a stream")
        rows = self._rows(self._train_store)
        return ValidationLoader(ValidationBatches(rows, self.batch_size, self._rank, self._world_size))

    def _stream_from(self, start: int) -> StreamDataset:
        assert self._corpus is not None and isinstance(self._corpus.train, StreamSource)
        self._position.pending.clear()
        here = self._position.n_streams
        build = functools.partial(
            TextStream,
            self._corpus.train,
            self.tokenizer,
            self.batch_size,
            self.block_size,
            self._packing,
            self._seed,
            self._shuffle_buffer,
            n_streams=self._world_size * here,
        )
        first = self._rank * here
        return StreamDataset([build(stream=first + i) for i in range(here)], self._position.streams, start)

    def _receive_streamed(self, item: tuple[Batch, dict[str, int]]) -> Batch:
        batch, position = item
        self._position.pending.append(position)
        return batch

    @property
    def _is_open(self) -> bool:
        return self._corpus is not None

    def _fingerprint(self) -> str:
        """Hash of what decides the sequence of training rows."""
        assert self._corpus is not None, "setup() comes first"
        text = self._corpus.train.identity() if self._train_store is None else self._train_store.path.name
        return hash_text(repr([text, self.tokenizer.identity, self.block_size, self._packing, self._seed]))

    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        assert self._corpus is not None and self._val_store is not None
        parts: dict[str, Any] = {"train": self._corpus.train.describe()}
        for name, store in (("train", self._train_store), ("validation", self._val_store)):
            if store is not None:
                rows = self._rows(store, validation=name == "validation")
                counts = {key: store.meta[key] for key in ("documents", "tokens", "bytes")}
                parts[name] = {
                    **store.meta["source"],
                    **counts,
                    "rows": len(rows),
                    "row_tokens": rows.n_tokens,
                    "hash": store.path.name,
                }
        tokenizer = self.tokenizer
        return {
            "dataset": self.dataset,
            **parts,
            "tokenizer": {
                "name": tokenizer.name,
                "hash": tokenizer.identity,
                "vocab_size": tokenizer.vocab_size,
            },
            "block_size": self.block_size,
            "packing": self._packing,
            "bytes_per_token": self.bytes_per_token,
        }


def _at_least(least: int, **values: int | None) -> None:
    for key, value in values.items():
        if value is not None and value < least:
            raise UserError(f"data.{key}={value}: expected at least {least}")


def _as_is(batch: Batch) -> Batch:
    return batch
