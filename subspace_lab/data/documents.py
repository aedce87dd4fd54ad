"""Reading documents from files: plain text is one a file, JSON lines one a line, `.gz` is opened on the way.

Which documents are held out for validation is decided by a hash of the document itself (or of its path), so
it does not change when files are added, renamed or read in another order, and equal texts never fall on both
sides.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from subspace_lab.errors import UserError, did_you_mean

Part = Literal["all", "train", "val"]

_SMALL = 64 << 20
"""Files up to this many bytes are hashed whole; larger ones by size, time of change and 64 MiB of samples."""


class Documents(Protocol):
    """A sequence of texts; the same identity promises the same texts in the same order."""

    def identity(self) -> str:
        """Hash of all that decides the texts: the token cache's key."""

    def __iter__(self) -> Iterator[str]: ...

    def describe(self) -> dict[str, Any]:
        """What a reader of results.json needs to get these texts again."""


@dataclass(frozen=True)
class TextFile:
    """One file and the name under which it is known on every machine (its path below the corpus' root)."""

    path: Path
    name: str

    @property
    def is_json(self) -> bool:
        """True for files that hold one JSON object per document."""
        stem = self.path.name.removesuffix(".gz")
        return stem.endswith((".json", ".jsonl", ".ndjson"))


@dataclass(frozen=True)
class FileDocuments:
    """The documents of some files, or the part of them that is (not) held out.

    Args:
        files: in reading order.
        part: `all`, or one side of the split.
        fraction: expected share of documents held out, in (0, 1).
        key: what the split hashes: `text` (the document) or, for plain text files, `name` (the file's name:
            the split of a source tree then stays the same from one version to the next).
        text_key: the field of a JSON document that holds its text.
    """

    files: Sequence[TextFile]
    part: Part = "all"
    fraction: float = 0.05
    key: Literal["text", "name"] = "text"
    text_key: str = "text"

    def identity(self) -> str:
        """Hash of the files' names and contents and of the split."""
        state = [self.part, self.fraction if self.part != "all" else None, self.key, self.text_key]
        return hash_text(json.dumps([*state, [[file.name, file_fingerprint(file.path)] for file in self.files]]))

    def __iter__(self) -> Iterator[str]:
        if self.part == "all":
            for file in self.files:
                yield from read_documents(file, self.text_key)
        elif len(self.files) == 1 and not self.files[0].is_json:
            yield from self._one_text()
        elif not any(file.is_json for file in self.files):
            yield from self._whole_files()
        else:
            yield from self._by_text()

    def _one_text(self) -> Iterator[str]:
        """The only document there is: its end is held out, cut where a line starts."""
        for text in read_documents(self.files[0], self.text_key):
            cut = int(len(text) * (1 - self.fraction))
            cut = text.rfind("\n", 0, cut) + 1 or cut
            side = text[cut:] if self.part == "val" else text[:cut]
            if side:
                yield side

    def _whole_files(self) -> Iterator[str]:
        keys = [unit_hash(file.name if self.key == "name" else file_fingerprint(file.path)) for file in self.files]
        limit = self.fraction if min(keys) < self.fraction else math.nextafter(min(keys), 1)  # at least one
        if self.part == "val":
            # By hash, not by name: a cap on the validation tokens then takes a fair sample, not the files
            # starting with 'a'.
            ranked = sorted(zip(keys, self.files, strict=True), key=lambda pair: pair[0])
            chosen = [file for key, file in ranked if key < limit]
        else:
            chosen = [file for key, file in zip(keys, self.files, strict=True) if key >= limit]
        for file in chosen:
            yield from read_documents(file, self.text_key)

    def _by_text(self) -> Iterator[str]:
        for file in self.files:
            for text in read_documents(file, self.text_key):
                if (unit_hash(text) < self.fraction) == (self.part == "val"):
                    yield text

    def describe(self) -> dict[str, Any]:
        """Number and names of the files, and the part taken of them."""
        names = [file.name for file in self.files]
        return {
            "files": len(names),
            "names": names if len(names) <= 32 else [*names[:16], "…", *names[-16:]],
            "part": self.part,
        }


def read_documents(file: TextFile, text_key: str) -> Iterator[str]:
    """Yield the non-empty documents of one file.

    Raises:
        UserError: unreadable or damaged file, not UTF-8, not JSON, or no `text_key` in an object.
    """
    try:
        for text in _json_documents(file.path, text_key) if file.is_json else _plain(file.path):
            if text.strip():
                yield _without_surrogates(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 text (byte {error.start})",
            hint="text, .json, .jsonl or these with .gz",
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.path} is a damaged or incomplete .gz file ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path} ({error.strerror or error})") from error


def _plain(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        # A byte order mark is no text, and line ends are the same on every machine.
        yield stream.read().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")


def _json_documents(path: Path, text_key: str) -> Iterator[str]:
    with _open(path) as stream:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
        if first == b"[":
            records = _load_json(first + stream.read(), path, 1)
            for number, record in enumerate(records, 1):
                yield _text_of(record, text_key, f"{path}, element {number}")
            return
        line = first + stream.readline()  # binary lines end at \n only: U+2028 and its like are text
        number = 1
        while line:
            if line.strip():
                yield _text_of(_load_json(line, path, number), text_key, f"{path}, line {number}")
            line = stream.readline()
            number += 1


def _load_json(data: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error


def _text_of(record: Any, text_key: str, where: str) -> str:
    if isinstance(record, str):
        return record
    text = record.get(text_key) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    keys = sorted(record) if isinstance(record, dict) else []
    near = did_you_mean(text_key, keys)
    raise UserError(
        f"{where}: no text under '{text_key}'; there is {', '.join(keys) or type(record).__name__}",
        hint=near or "data.text_key=NAME says which field holds the text",
    )


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _without_surrogates(text: str) -> str:
    # JSON may escape half a surrogate pair; such a string cannot be encoded, neither by us nor by a
    # tokenizer.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")
    return text


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2.0**64


def hash_text(text: str) -> str:
    """Hex digest (32 characters) of a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Hex digest of a file's content: whole up to 64 MiB, sampled (with size and time of change) beyond."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        status = path.stat()
        with path.open("rb") as stream:
            if status.st_size <= _SMALL:
                digest.update(stream.read())
            else:
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
                for sample in range(64):
                    stream.seek(sample * (status.st_size - (1 << 20)) // 63)
                    digest.update(stream.read(1 << 20))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    return digest.hexdigest()
