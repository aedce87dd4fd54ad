from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from subspace_lab.data.cache import TokenStore, open_or_build
from subspace_lab.data.documents import FileDocuments, TextFile
from subspace_lab.data.packing import IGNORE, PackedRows, PaddedRows, Rows
from subspace_lab.data.tokenization import ByteTokenizer

BLOCK, EOS = 64, 256


@pytest.fixture
def store(tmp_path: Path, jsonl_files: list[Path]) -> TokenStore:
    documents = FileDocuments([TextFile(path, path.name) for path in jsonl_files])
    return open_or_build(documents, ByteTokenizer(), tmp_path / "cache", "test")


def everything(rows: Rows) -> dict[str, torch.Tensor]:
    return rows.batch(np.arange(len(rows), dtype=np.int64))


def test_packed_rows_are_the_token_stream(store: TokenStore) -> None:
    rows = PackedRows(store, BLOCK, EOS)
    batch = everything(rows)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    np.testing.assert_array_equal(batch["input_ids"].flatten(), store.tokens[: len(rows) * BLOCK])
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert len(rows) == len(store.tokens) // BLOCK and rows.n_tokens == len(rows) * BLOCK


def test_packed_validation_counts_every_token(store: TokenStore) -> None:
    rows = PackedRows(store, BLOCK, EOS, keep_tail=True)
    labels = everything(rows)["labels"]
    np.testing.assert_array_equal(labels[labels != IGNORE], store.tokens)
    assert rows.n_tokens == len(store.tokens)
    tail = len(store.tokens) % BLOCK
    assert tail and (labels[-1, tail:] == IGNORE).all()
    assert (everything(rows)["input_ids"][-1, tail:] == EOS).all()


def test_packed_cap(store: TokenStore) -> None:
    rows = PackedRows(store, BLOCK, EOS, keep_tail=True, max_tokens=100)
    assert len(rows) == 2 and rows.n_tokens == 100
    assert int((everything(rows)["labels"] != IGNORE).sum()) == 100


def test_padded_rows_are_documents(store: TokenStore) -> None:
    rows = PaddedRows(store, BLOCK, pad_id=EOS, eos_id=EOS)
    batch = everything(rows)
    assert len(rows) == store.meta["documents"]
    start = 0
    for row, end in enumerate(store.ends):
        tokens = np.array(store.tokens[start:end], dtype=np.int64)
        length = min(len(tokens), BLOCK)
        expected = tokens[:length].copy()
        expected[-1] = EOS  # cut documents end in eos too, as T5's tokenizer makes them
        np.testing.assert_array_equal(batch["input_ids"][row, :length], expected)
        np.testing.assert_array_equal(batch["labels"][row, :length], expected)
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] == EOS).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (BLOCK - length)
        start = int(end)
    assert rows.n_tokens == int((batch["labels"] != IGNORE).sum()) == int(batch["attention_mask"].sum())


def test_padded_cap(store: TokenStore) -> None:
    rows = PaddedRows(store, BLOCK, EOS, EOS, max_tokens=2 * BLOCK)
    assert len(rows) == 2 and rows.n_tokens >= 2 * BLOCK
    assert len(PaddedRows(store, BLOCK, EOS, EOS, max_tokens=10**9)) == store.meta["documents"]
