"""What each name of the `data` group means: which files or which hub data set, and what is held out."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from subspace_lab.data.documents import Documents, FileDocuments, TextFile, hash_text
from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.streaming import StreamSource
from subspace_lab.errors import UserError

Dataset = Literal["stdlib_text", "text", "c4", "wikitext2", "tiny_shakespeare"]
Files = str | Sequence[str] | None

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
}
_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Corpus:
    """Training and validation text; no document is in both."""

    train: Documents | StreamSource
    validation: Documents | StreamSource


@dataclass(frozen=True)
class Request:
    """The user's choices that decide the text: `TextDataModule`'s arguments of the same names."""

    dataset: Dataset
    files: Files
    val_files: Files
    text_key: str
    val_fraction: float
    streaming: bool | None
    data_dir: Path
    cache_dir: Path


def resolve(request: Request) -> Corpus:
    """Find the text that `data=NAME` and its options ask for.

    Raises:
        UserError: nothing there, and the hub cannot be reached; names what was tried and what to type.
    """
    name = request.dataset
    if name == "stdlib_text":
        if request.files or request.val_files:
            raise UserError(
                "data=stdlib_text reads the running Python's library and takes no files",
                hint="data=text data.files=...",
            )
        return _split(stdlib_files(), request, key="name")
    if request.val_files and not request.files:
        raise UserError("data.val_files is given without data.files", hint="data.files=[...] names the training text")
    if request.files:
        return _from_files(request)
    if name == "text":
        raise UserError(
            "data=text needs files",
            hint="data.files='folder/*.txt', or a list, also of .json, .jsonl and .gz",
        )
    if name == "c4":
        return _c4(request)
    return _wikitext2(request) if name == "wikitext2" else _tiny_shakespeare(request)


def stdlib_files() -> list[TextFile]:
    """Source and text files of the running Python's standard library, sorted by name.

    Its tests are left out, files that are not UTF-8 (some of the library's own), and repetitions of an earlier file,
    which would put the same text on both sides of the split.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith((".py", ".txt", ".rst"))]
    files: dict[str, TextFile] = {}
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        text = _text(path).strip()
        if text:
            files.setdefault(hash_text(text), TextFile(path, name))
    if len(files) < 50:
        raise UserError(
            f"data=stdlib_text: only {len(files)} source files under {root}",
            hint="data=text data.files='folder/*.txt', or another Python",
        )
    return list(files.values())


def _text(path: Path) -> str:
    """Content of a regular UTF-8 file, of any other nothing."""
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _from_files(request: Request) -> Corpus:
    files = find_files(request.files, request.data_dir, "data.files")
    held_out = find_files(request.val_files, request.data_dir, "data.val_files") if request.val_files else []
    both = {file.path.resolve() for file in files} & {file.path.resolve() for file in held_out}
    if both:
        raise UserError(
            f"{min(both)} is in data.files and in data.val_files",
            hint="validation text must not be trained on",
        )
    if request.streaming:
        if not held_out:
            raise UserError(
                "data.streaming=true needs data.val_files",
                hint="or leave data.streaming=null: documents are then held out",
            )
        train = StreamSource(data_files=tuple(str(file.path) for file in files), text_key=request.text_key)
        return Corpus(train, FileDocuments(held_out, text_key=request.text_key))
    if not held_out:
        return _split(files, request)
    return Corpus(*(FileDocuments(part, text_key=request.text_key) for part in (files, held_out)))


def _split(files: list[TextFile], request: Request, key: Literal["text", "name"] = "text") -> Corpus:
    def part(side: Literal["train", "val"]) -> FileDocuments:
        return FileDocuments(files, side, request.val_fraction, key, request.text_key)

    return Corpus(part("train"), part("val"))


def _c4(request: Request) -> Corpus:
    folder = request.data_dir / "c4"
    if not request.streaming:
        train, held_out = local_parts(folder, (".json", ".jsonl", ".json.gz", ".jsonl.gz"))
        if train and held_out:
            return Corpus(*(FileDocuments(part, text_key=request.text_key) for part in (train, held_out)))
        if train:
            return _split(train, request)
    if request.streaming is False:
        raise _missing(request, folder, "data.streaming=false keeps it off the hub")
    hint = f"offline: {_override('FILE.jsonl.gz')}, or SUBSPACE_DATA=FOLDER with FOLDER/c4/*.jsonl.gz"
    tried = "data.streaming=true" if request.streaming else f"c4: nothing under {folder} (SUBSPACE_DATA)"
    sources = (
        StreamSource("allenai/c4", "en", split=split, tried=tried, hint=hint) for split in ("train", "validation")
    )
    return Corpus(*sources)


def _wikitext2(request: Request) -> Corpus:
    folder = request.data_dir / "wikitext2_raw"
    train, held_out = local_parts(folder, (".raw", ".txt", ".tokens", ".raw.gz", ".txt.gz"))
    if train and held_out:
        return Corpus(*(FileDocuments(part) for part in (train, held_out)))
    if held_out:
        there = ", ".join(file.name for file in held_out)
        problem = f"the train part (wiki.train.raw) is not in {folder} (SUBSPACE_DATA), only {there}"
        hint = f"put wiki.train.raw there, or data.files=[wiki.train.raw] data.val_files=[{held_out[0].path}]"
    else:
        problem = f"nothing under {folder} (SUBSPACE_DATA)"
        layout = "FOLDER/wikitext2_raw/wiki.{train,valid}.raw"
        hint = f"SUBSPACE_DATA=FOLDER with {layout}, or {_override('wiki.train.raw')}"
    if request.streaming is False:
        raise _missing(request, folder, "data.streaming=false keeps it off the hub")
    files = []
    for split in ("train", "validation"):
        path = request.cache_dir / "hub" / f"wikitext2-{split}.txt"
        arguments = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split}
        # The hub's rows are lines, the blank ones emptied: put together they are the original file again.
        files.append(_download(path, None, arguments, " \n", f"wikitext2: {problem}", hint))
    return Corpus(*(FileDocuments([file]) for file in files))


def _tiny_shakespeare(request: Request) -> Corpus:
    path = request.data_dir / "tiny_shakespeare" / "input.txt"
    if path.is_file():
        return _split([TextFile(path, path.name)], request)
    if request.streaming is False:
        raise _missing(request, path, "data.streaming=false keeps it off the network")
    hint = f"SUBSPACE_DATA=FOLDER with FOLDER/tiny_shakespeare/input.txt, or {_override('input.txt')}"
    tried = f"tiny_shakespeare: no {path} (SUBSPACE_DATA)"
    copy = request.cache_dir / "hub" / "tiny_shakespeare.txt"
    arguments = {"path": "text", "data_files": _SHAKESPEARE_URL, "sample_by": "document", "split": "train"}
    return _split([_download(copy, _SHAKESPEARE_URL, arguments, "", tried, hint)], request)


def _download(path: Path, url: str | None, arguments: dict[str, str], blank: str, tried: str, hint: str) -> TextFile:
    """A small data set, fetched through `datasets` once and kept as the text file `path`.

    Args:
        path: where it is kept; with that file there is no need of network or of `datasets`.
        url: what it is fetched from, if not from the hub.
        arguments: of `datasets.load_dataset`.
        blank: what an empty row stands for.
        tried: what was looked for before, for the error message.
        hint: what to type instead, for the error message.
    """
    if not path.exists():
        source = url or "{path} {name} {split} on the Hugging Face hub".format(**arguments)
        try:
            require_network(url)
            import datasets

            text = "".join(row or blank for row in datasets.load_dataset(**arguments)["text"])
        except Exception as error:
            raise hub_error(tried, source, error, hint) from error
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    return TextFile(path, path.name)


def local_parts(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[TextFile], list[TextFile]]:
    """Training and validation files of a prepared folder, told apart by name; test files are left out."""
    train, held_out = [], []
    for path in sorted(folder.glob("**/*")) if folder.is_dir() else []:
        if path.is_file() and path.name.endswith(suffixes):
            file = TextFile(path, path.relative_to(folder).as_posix())
            words = set(re.split(r"[^a-z]+", path.name.lower()))
            if words & {"val", "valid", "validation", "dev"}:
                held_out.append(file)
            elif "test" not in words:
                train.append(file)
    return train, held_out


def find_files(patterns: Files, data_dir: Path, key: str) -> list[TextFile]:
    """Files that paths, folders or globs stand for, also below `data_dir`, sorted and without repetition.

    Raises:
        UserError: a pattern that matches nothing.
    """
    paths: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        tried = [str(Path(pattern).expanduser())]
        if not Path(tried[0]).is_absolute():
            tried.append(str(data_dir / pattern))
        for candidate in tried:
            found = [candidate] if Path(candidate).exists() else glob.glob(candidate, recursive=True)
            matched = {file for path in found for file in _files_at(Path(path))}
            if matched:
                paths |= matched
                break
        else:
            where = " and ".join(str(Path(path).absolute()) for path in tried)
            raise UserError(
                f"{key}: no file matches '{pattern}' (tried {where})",
                hint=f"{key}='folder/*.txt' or {key}=[a.jsonl.gz,b.txt], also relative to SUBSPACE_DATA",
            )
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return [
        TextFile(path, path.absolute().relative_to(root).as_posix())
        for path in sorted(paths, key=lambda path: path.absolute())
    ]


def _files_at(path: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder; hidden ones (.git and its like) are no text."""
    if path.is_file():
        yield path
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _override(example: str) -> str:
    return f"data.files=[{example}]"


def _missing(request: Request, tried: Path, why: str) -> UserError:
    return UserError(
        f"data={request.dataset}: nothing at {tried} (SUBSPACE_DATA), and {why}",
        hint=f"SUBSPACE_DATA=FOLDER, or {_override('FILE')}",
    )
