from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspace_lab.data.cache import Limit, TokenStore, open_or_build
from subspace_lab.data.tokenization import ByteTokenizer, Tokenizer
from subspace_lab.errors import UserError


class Texts:
    """Documents in memory that leave a mark each time they are read."""

    def __init__(self, texts: list[str], log: Path | None = None, delay: float = 0.0) -> None:
        self._texts, self._log, self._delay = texts, log, delay

    def identity(self) -> str:
        return repr(self._texts)

    def __iter__(self) -> Iterator[str]:
        if self._log is not None:
            with self._log.open("a") as stream:
                stream.write("read\n")
        time.sleep(self._delay)
        return iter(self._texts)

    def describe(self) -> dict[str, Any]:
        return {"source": "test"}


class WideTokenizer(ByteTokenizer):
    """Bytes with ids that need 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.eos_id, self.identity = 100_000, 99_999, "wide"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()], ids=["uint16", "uint32"])
def test_contents(tmp_path: Path, stories: list[str], tokenizer: Tokenizer) -> None:
    store = open_or_build(Texts(stories), tokenizer, tmp_path, "test")
    expected = [i for text in stories for i in (*text.encode(), tokenizer.eos_id)]
    assert store.tokens.dtype == (np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32)
    np.testing.assert_array_equal(store.tokens, expected)
    np.testing.assert_array_equal(store.sizes, [len(text.encode()) for text in stories])
    np.testing.assert_array_equal(store.ends, np.cumsum(store.sizes + 1))
    assert store.meta["documents"] == len(stories) and store.meta["tokens"] == len(expected)
    assert store.meta["bytes"] == sum(len(text.encode()) for text in stories)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_read_once_then_from_the_cache(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = open_or_build(Texts(["one", "two"], log), ByteTokenizer(), tmp_path / "cache", "test")
    again = open_or_build(Texts(["one", "two"], log), ByteTokenizer(), tmp_path / "cache", "test")
    assert first.path == again.path and log.read_text() == "read\n"
    other = open_or_build(Texts(["one", "three"], log), ByteTokenizer(), tmp_path / "cache", "test")
    wide = open_or_build(Texts(["one", "two"], log), WideTokenizer(), tmp_path / "cache", "test")
    assert len({first.path, other.path, wide.path}) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "meta", "missing"])
def test_damaged_entry_is_rebuilt_and_named(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_or_build(Texts(["some text", "more"]), ByteTokenizer(), tmp_path, "test")
    expected = np.array(store.tokens)
    path = store.path / ("meta.json" if damage == "meta" else "tokens.bin")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[3] ^= 1
    path.write_bytes(data[:-2] if damage in ("truncate", "meta") else data)
    if damage == "missing":
        path.unlink()
    with caplog.at_level(logging.WARNING):
        again = open_or_build(Texts(["some text", "more"]), ByteTokenizer(), tmp_path, "test")
    np.testing.assert_array_equal(again.tokens, expected)
    assert [record.getMessage() for record in caplog.records] == [
        f"Token cache {store.path} is damaged: building it again."
    ]


def _prepare(cache: Path, log: Path) -> None:
    open_or_build(Texts(["some text", "more"], log, delay=0.5), ByteTokenizer(), cache, "test")


def test_two_processes_at_once_do_the_work_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare, args=(tmp_path / "c", tmp_path / "log")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "read\n"


def test_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    class Killed(Texts):
        def __iter__(self) -> Iterator[str]:
            yield "x" * (1 << 21)
            os._exit(9)

    documents = Killed(["never"])
    process = multiprocessing.get_context("fork").Process(
        target=open_or_build, args=(documents, ByteTokenizer(), tmp_path, "test")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 9
    store = open_or_build(Texts(["never"]), ByteTokenizer(), tmp_path, "test")  # same key, and the lock is free
    assert bytes(store.tokens[:5].astype(np.uint8)) == b"never"


def test_limit_stops_reading(tmp_path: Path, stories: list[str]) -> None:
    long = ["x" * (1 << 20)] * 5
    assert open_or_build(Texts(long), ByteTokenizer(), tmp_path, "t", Limit(1000, None)).meta["documents"] == 1
    assert open_or_build(Texts(long), ByteTokenizer(), tmp_path, "t", Limit(1000, 500)).meta["documents"] == 2


def test_no_text_and_no_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text for c4-val.*data.val_files"):
        open_or_build(Texts([]), ByteTokenizer(), tmp_path, "c4-val")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"cannot write to the token cache .*SUBSPACE_CACHE"):
        open_or_build(Texts(["a"]), ByteTokenizer(), file, "test")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subspace_lab.data.cache.os.rename", full)
    with pytest.raises(UserError, match=r"no space left in the token cache"):
        open_or_build(Texts(["a"]), ByteTokenizer(), tmp_path, "test")


def test_bytes_per_token(tmp_path: Path) -> None:
    store = open_or_build(Texts(["ab", "ééé"]), ByteTokenizer(), tmp_path, "test")  # 2+1 and 6+1 tokens
    assert store.bytes_per_token() == pytest.approx(8 / 10)
    assert store.bytes_per_token(3) == pytest.approx(2 / 3)
    assert store.bytes_per_token(5) == pytest.approx((2 + 6 * 2 / 7) / 5)
    assert store.bytes_per_token(99) == pytest.approx(8 / 10)


def test_store_travels_as_its_path(tmp_path: Path) -> None:
    import pickle

    store = open_or_build(Texts(["text " * 10_000]), ByteTokenizer(), tmp_path, "test")
    data = pickle.dumps(store)
    copy: TokenStore = pickle.loads(data)
    assert len(data) < 5000
    np.testing.assert_array_equal(copy.tokens, store.tokens)
    assert json.loads((store.path / "meta.json").read_text())["source"] == {"source": "test"}
