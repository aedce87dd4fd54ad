from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subspace_lab.data.corpora import Request, find_files, local_parts, resolve, stdlib_files
from subspace_lab.data.documents import FileDocuments
from subspace_lab.data.streaming import StreamSource
from subspace_lab.errors import UserError


@pytest.fixture
def request_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Requests for an empty data folder on a machine without network."""

    def no_address(*args: Any) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("subspace_lab.data.hub.socket.getaddrinfo", no_address)
    monkeypatch.setattr("subspace_lab.data.hub.urllib.request.getproxies", dict)
    base = Request("text", None, None, "text", 0.05, None, tmp_path / "data", tmp_path / "cache")
    return lambda dataset, **changes: replace(base, dataset=dataset, **changes)


def test_stdlib_is_this_pythons_sources_in_a_fixed_order() -> None:
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"argparse.py", "asyncio/base_events.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]
    size = sum(file.path.stat().st_size for file in files)
    assert 6e6 < size < 25e6, f"{size} bytes"
    assert all(file.path == Path(sysconfig.get_path("stdlib"), file.name) for file in files)
    assert names == [file.name for file in stdlib_files()]


def test_stdlib_files_held_out_are_never_trained_on(request_for: Any) -> None:
    corpus = resolve(request_for("stdlib_text"))
    train, held_out = set(corpus.train), set(corpus.validation)
    assert not train & held_out
    share = sum(map(len, held_out)) / sum(map(len, train | held_out))
    assert 0.01 < share < 0.15


def test_find_files(request_for: Any, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text_folder / ".hidden").mkdir()
    (text_folder / ".hidden" / "x.txt").write_text("no text")
    everything = find_files(str(text_folder), tmp_path, "data.files")
    assert [file.name for file in everything] == sorted(file.name for file in everything)
    assert len(everything) == 40 and everything[0].name == "x/000.txt"
    assert find_files([f"{text_folder}/**/*.txt", str(text_folder)], tmp_path, "data.files") == everything
    monkeypatch.chdir(tmp_path)
    assert len(find_files("x/*.txt", text_folder, "data.files")) == 20, "relative to SUBSPACE_DATA"
    assert len(find_files("texts/y/*.txt", Path("none"), "data.files")) == 20, "relative to here"
    assert find_files("texts/x/000.txt", Path("none"), "data.files")[0].name == "000.txt"


def test_prepared_folder_is_found_and_divided_by_name(request_for: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "c4"
    folder.mkdir(parents=True)
    for name in ("c4-train.sample.jsonl", "c4-validation.sample.jsonl", "c4-test.jsonl", "README.md"):
        (folder / name).write_text(f'{{"text": "{name}"}}\n')
    train, held_out = local_parts(folder, (".jsonl",))
    assert [f.name for f in train] == ["c4-train.sample.jsonl"]
    assert [f.name for f in held_out] == ["c4-validation.sample.jsonl"]
    corpus = resolve(request_for("c4"))
    assert (list(corpus.train), list(corpus.validation)) == ([train[0].name], [held_out[0].name])
    held_out[0].path.unlink()
    assert [part.part for part in vars(resolve(request_for("c4"))).values()] == ["train", "val"]


def test_c4_streams_where_there_are_no_files(request_for: Any) -> None:
    corpus = resolve(request_for("c4"))
    assert isinstance(corpus.train, StreamSource) and isinstance(corpus.validation, StreamSource)
    assert (corpus.train.path, corpus.train.config) == ("allenai/c4", "en")
    assert (corpus.train.split, corpus.validation.split) == ("train", "validation")
    with pytest.raises(UserError, match=r"c4: nothing under .*SUBSPACE_DATA.*no network.*data\.files="):
        next(iter(corpus.validation))


def test_wikitext2_without_its_train_part(request_for: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "wikitext2_raw"
    folder.mkdir(parents=True)
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (folder / name).write_text(" = Title = \n some words \n")
    with pytest.raises(UserError, match=r"train part .* is not in .*only wiki\.valid\.raw.*data\.files=") as caught:
        resolve(request_for("wikitext2"))
    assert "\n" not in str(caught.value)
    (folder / "wiki.train.raw").write_text(" = Other = \n words \n")
    corpus = resolve(request_for("wikitext2"))
    assert list(corpus.train) == [" = Other = \n words \n"]


def test_downloaded_text_is_kept_and_used_offline(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(**arguments: str) -> dict[str, list[str]]:
        calls.append(arguments)
        return {"text": ["", " = Title = \n", "", f" words of {arguments['split']} \n"]}

    import datasets

    with monkeypatch.context() as online:
        online.setattr("subspace_lab.data.corpora.require_network", lambda url: None)
        online.setattr(datasets, "load_dataset", load_dataset)
        first = resolve(request_for("wikitext2"))
    again = resolve(request_for("wikitext2"))
    assert list(first.train) == list(again.train) == [" \n = Title = \n \n words of train \n"]
    assert list(again.validation) == [" \n = Title = \n \n words of validation \n"]
    assert [call["split"] for call in calls] == ["train", "validation"]


def test_tiny_shakespeare(request_for: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny_shakespeare: no .*SUBSPACE_DATA.*no network.*data\.files=\[input"):
        resolve(request_for("tiny_shakespeare"))
    path = tmp_path / "data" / "tiny_shakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text("To be\n" * 100)
    corpus = resolve(request_for("tiny_shakespeare", val_fraction=0.1))
    assert (len(next(iter(corpus.train))), len(next(iter(corpus.validation)))) == (540, 60)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("text", {}, r"data=text needs files"),
        ("text", {"files": "no/*.txt"}, r"no file matches 'no/\*\.txt' \(tried .* and .*SUBSPACE_DATA"),
        ("text", {"val_files": "x"}, r"without data\.files"),
        ("stdlib_text", {"files": "x"}, r"takes no files .*data=text"),
        ("c4", {"streaming": False}, r"data=c4: nothing at .*data\.streaming=false"),
        ("wikitext2", {"streaming": False}, r"data=wikitext2: nothing at"),
        ("tiny_shakespeare", {"streaming": False}, r"data=tiny_shakespeare: nothing at"),
        ("wikitext2", {}, r"nothing under .*SUBSPACE_DATA.*no network.*wiki\.\{train,valid\}\.raw"),
    ],
)
def test_what_is_missing_is_said(request_for: Any, dataset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(request_for(dataset, **changes))
    assert "\n" not in str(caught.value)


def test_files_of_the_user(request_for: Any, jsonl_files: list[Path]) -> None:
    names = [str(path) for path in jsonl_files]
    corpus = resolve(request_for("c4", files=names[:2], val_files=names[2]))
    assert isinstance(corpus.train, FileDocuments) and corpus.train.part == "all"
    assert not set(corpus.train) & set(corpus.validation)
    with pytest.raises(UserError, match=r"is in data\.files and in data\.val_files"):
        resolve(request_for("text", files=names, val_files=names[2]))
    streamed = resolve(request_for("text", files=names[:2], val_files=names[2:], streaming=True))
    assert isinstance(streamed.train, StreamSource) and isinstance(streamed.validation, FileDocuments)
    with pytest.raises(UserError, match=r"needs data\.val_files"):
        resolve(request_for("text", files=names, streaming=True))
