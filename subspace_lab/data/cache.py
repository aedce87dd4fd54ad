"""Tokens on disk: each corpus is tokenised once per tokenizer, then memory-mapped.

A cache entry is a folder `<dataset>-<part>-<key>` with

    tokens.bin   uint16 or uint32, all documents one after the other, each followed by the tokenizer's
    `eos_id` ends.bin     int64, (documents,): where each document ends in tokens.bin, separator included
    bytes.bin    int64, (documents,): UTF-8 bytes of each document
    meta.json    sizes and hashes of the three, and what they were made from

The key hashes the texts, the tokenizer and the version of this layout, so a changed file or tokenizer makes a
new entry. An entry is written under a temporary name and renamed when complete; a lock lets one of several
processes do the work. What is found damaged is rebuilt, with one line that says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from subspace_lab.data.documents import Documents
from subspace_lab.data.tokenization import Tokenizer
from subspace_lab.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when documents, tokens or layout change for the same input: new entries are then made."""

_CHUNK = 1 << 20  # characters per call of the tokenizer
_FILES = ("tokens.bin", "ends.bin", "bytes.bin")


class Limit(NamedTuple):
    """Enough documents for `tokens` tokens, of which a document gives at most `row` (null: all it has)."""

    tokens: int
    row: int | None


@dataclass
class TokenStore:
    """A tokenised corpus, memory-mapped; sent to a worker process it travels as its path.

    Attributes:
        path: the cache entry.
        meta: content of meta.json.
        tokens: (n_tokens,) uint16 or uint32, read-only.
        ends: (n_documents,) int64.
        sizes: (n_documents,) int64, UTF-8 bytes.
    """

    path: Path
    meta: dict[str, Any]
    tokens: npt.NDArray[Any] = field(init=False, repr=False)
    ends: npt.NDArray[np.int64] = field(init=False, repr=False)
    sizes: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._map()

    def _map(self) -> None:
        self.tokens = np.memmap(self.path / "tokens.bin", dtype=np.dtype(self.meta["dtype"]), mode="r")
        self.ends = np.memmap(self.path / "ends.bin", dtype=np.int64, mode="r")
        self.sizes = np.memmap(self.path / "bytes.bin", dtype=np.int64, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "meta": self.meta}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.meta = state["path"], state["meta"]
        self._map()

    def bytes_per_token(self, max_tokens: int | None = None) -> float:
        """UTF-8 bytes of text per token (separators count as tokens) in the first `max_tokens` tokens."""
        n_tokens = len(self.tokens) if max_tokens is None else min(max_tokens, len(self.tokens))
        whole = int(np.searchsorted(self.ends, n_tokens, side="right"))  # documents entirely inside
        total = float(self.sizes[:whole].sum())
        start = int(self.ends[whole - 1]) if whole else 0
        if n_tokens > start:
            total += float(self.sizes[whole]) * (n_tokens - start) / float(int(self.ends[whole]) - start)
        return total / n_tokens


def open_or_build(
    documents: Documents, tokenizer: Tokenizer, cache_dir: Path, label: str, limit: Limit | None = None
) -> TokenStore:
    """Return the token store of `documents`, making it if it is not there or damaged.

    Args:
        label: `<dataset>-<part>`, the readable half of the folder's name.
        documents: the texts; not read when the entry is there.
        tokenizer: turns them into ids.
        cache_dir: the folder of all entries.
        limit: stop reading early (a streamed corpus has more validation text than anyone wants).

    Raises:
        UserError: no text in the documents, or a cache folder that cannot be written.
    """
    key = hashlib.sha256(json.dumps([VERSION, documents.identity(), tokenizer.identity, limit]).encode()).hexdigest()[
        :20
    ]
    path = cache_dir / f"{label}-{key}"
    store = _load(path)
    if store is not None:
        return store
    from filelock import FileLock

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{path.name}.lock"):
            store = _load(path)  # another process may have made it while we waited
            if store is None:
                if path.exists():
                    log.warning("Token cache %s is damaged: building it again.", path)
                    _remove(path)
                store = _build(path, documents, tokenizer, label, limit)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left in" if full else "cannot write to"
        raise UserError(
            f"{what} the token cache {cache_dir} ({error.strerror or error})",
            hint="SUBSPACE_CACHE=/some/folder or paths.cache_dir=/some/folder puts it elsewhere",
        ) from error
    return store


def _load(path: Path) -> TokenStore | None:
    """The entry at `path`, or None if there is none that is complete and unharmed."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        for name in _FILES:
            if meta["files"][name] != _fingerprint(path / name):
                return None
        return TokenStore(path, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(path: Path, documents: Documents, tokenizer: Tokenizer, label: str, limit: Limit | None) -> TokenStore:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(part)
    part.mkdir()
    try:
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        ends: list[int] = []
        sizes: list[int] = []
        total = counted = 0
        with (part / "tokens.bin").open("wb") as out, _Progress(f"Tokenising {label}") as progress:
            for texts in _chunks(documents):
                if limit is not None and counted >= limit.tokens:
                    break
                for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
                    row = np.append(ids, np.uint32(tokenizer.eos_id)).astype(dtype)
                    out.write(row.tobytes())
                    total += len(row)
                    ends.append(total)
                    sizes.append(len(text.encode("utf-8")))
                    counted += len(row) if limit is None or limit.row is None else min(len(row), limit.row)
                progress.update(len(ends), total)
        if not ends:
            raise UserError(
                f"no text for {label}: the files hold no document for this part",
                hint="more data.files, data.val_files=FILE, or a larger data.val_fraction",
            )
        (part / "ends.bin").write_bytes(np.asarray(ends, dtype=np.int64).tobytes())
        (part / "bytes.bin").write_bytes(np.asarray(sizes, dtype=np.int64).tobytes())
        meta = {
            "version": VERSION,
            "dtype": np.dtype(dtype).name,
            "tokens": total,
            "documents": len(ends),
            "bytes": sum(sizes),
            "tokenizer": {"name": tokenizer.name, "identity": tokenizer.identity},
            "source": documents.describe(),
            "files": {name: _fingerprint(part / name) for name in _FILES},
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        os.rename(part, path)
    finally:
        _remove(part)
    return TokenStore(path, meta)


def _chunks(documents: Documents) -> Iterator[list[str]]:
    """Documents in lists of about `_CHUNK` characters."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _fingerprint(path: Path) -> str:
    """Size and hash of our own file: whole up to 64 MiB, 64 samples of 1 MiB beyond (opening stays quick)."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        if size <= 64 << 20:
            digest.update(stream.read())
        else:
            for sample in range(64):
                stream.seek(sample * (size - (1 << 20)) // 63)
                digest.update(stream.read(1 << 20))
    return f"{size}-{digest.hexdigest()}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


class _Progress:
    """A rich progress line that appears only when the work has lasted two seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        return self

    def update(self, documents: int, tokens: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._start < 2.0:
                return
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title)
        self._bar.update(self._task, description=f"{self._title}: {documents:,} documents, {tokens:,} tokens")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
