from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from subspace_lab.data.documents import FileDocuments, TextFile, file_fingerprint, read_documents, unit_hash
from subspace_lab.errors import UserError


def as_files(paths: list[Path]) -> list[TextFile]:
    return [TextFile(path, path.name) for path in paths]


def test_json_lines_end_at_newlines_only(jsonl_files: list[Path], stories: list[str]) -> None:
    assert list(FileDocuments(as_files(jsonl_files))) == stories


def test_json_array_strings_and_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text(' [{"text": "one"}, "two", {"text": "  "}, {"text": "half \\ud800 pair"}]')
    texts = list(read_documents(TextFile(path, path.name), "text"))
    assert texts == ["one", "two", "half ? pair"]
    assert all(text.encode("utf-8") for text in texts)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_split_by_text_is_a_partition(jsonl_files: list[Path], stories: list[str], fraction: float) -> None:
    files = as_files(jsonl_files)
    train, held_out = (list(FileDocuments(files, part, fraction)) for part in ("train", "val"))
    assert sorted(train + held_out) == sorted(stories)
    assert not set(train) & set(held_out)
    assert held_out == [text for text in stories if unit_hash(text) < fraction]
    # What is held out does not depend on the order of the files or on other files.
    assert list(FileDocuments(files[1:2], "val", fraction)) == [t for t in held_out if t in stories[40:80]]


@pytest.mark.parametrize("key", ["text", "name"])
def test_plain_files_are_held_out_whole(text_folder: Path, key: str) -> None:
    files = [TextFile(p, p.relative_to(text_folder).as_posix()) for p in sorted(text_folder.rglob("*.txt"))]
    train, held_out = (list(FileDocuments(files, part, 0.2, key)) for part in ("train", "val"))  # type: ignore[arg-type]
    texts = {file.path.read_bytes().decode() for file in files}
    assert set(train) | set(held_out) == texts and not set(train) & set(held_out)
    assert 0 < len(held_out) < 20
    few = list(FileDocuments(files[:2], "val", 1e-6, key))  # type: ignore[arg-type]
    assert len(few) == 1, "of two files one is held out, however small the fraction"


def test_single_text_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    files = [TextFile(path, path.name)]
    (head,), (tail,) = (list(FileDocuments(files, part, 0.1)) for part in ("train", "val"))
    assert head + tail == path.read_text() and head.endswith("\n")
    assert 0.09 < len(tail) / len(head + tail) < 0.12


def test_identity_follows_content(jsonl_files: list[Path]) -> None:
    documents = FileDocuments(as_files(jsonl_files))
    before = documents.identity()
    assert before == FileDocuments(as_files(jsonl_files)).identity()
    assert before != FileDocuments(as_files(jsonl_files), "train").identity()
    jsonl_files[0].write_bytes(jsonl_files[0].read_bytes() + b'{"text": "more"}\n')
    assert before != documents.identity()


def test_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_lab.data.documents._SMALL", 1 << 20)
    path = tmp_path / "large.txt"
    path.write_bytes(b"a" * (3 << 20))
    before = file_fingerprint(path)
    with path.open("r+b") as stream:
        stream.seek(1 << 20)
        stream.write(b"b")
    assert before != file_fingerprint(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: not JSON"),
        ("keys.jsonl", b'{"txt": "a", "url": "b"}\n', r"no text under 'text'; there is txt, url.*did you mean 'txt'"),
        ("half.txt.gz", gzip.compress(b"word " * 1000, mtime=0)[:-20], r"damaged or incomplete"),
        ("plain.txt.gz", b"not compressed", r"damaged or incomplete"),
        ("image.txt", b"\x89PNG\xff\xfe", r"not UTF-8 text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_documents(TextFile(path, name), "text"))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    caught.match(message)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        list(read_documents(TextFile(tmp_path / "no.txt", "no.txt"), "text"))


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert list(read_documents(TextFile(path, "dos.txt"), "text")) == ["one\ntwo\n"]
    array = tmp_path / "marked.json"
    array.write_bytes(json.dumps({"text": "x"}).encode())
    assert list(read_documents(TextFile(array, "marked.json"), "text")) == ["x"]
