"""Small real corpora and tokenizers, made on the spot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly bake bread near old rivers"


def story(number: int) -> str:
    """Text of document `number`: different for each, of different lengths, with what breaks careless readers."""
    vocabulary = WORDS.split()
    words = [vocabulary[(number * 7 + i * (number % 5 + 1)) % len(vocabulary)] for i in range(20 + 13 * (number % 11))]
    return f"Story {number}. " + " ".join(words) + "\u2028café\u0085end.\n"


@pytest.fixture
def stories() -> list[str]:
    return [story(number) for number in range(120)]


@pytest.fixture
def jsonl_files(tmp_path: Path, stories: list[str]) -> list[Path]:
    """Three shards, one of them compressed; written raw, so that U+2028 stands unescaped in its line."""
    paths = []
    for shard, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.json")):
        lines = [json.dumps({"text": t, "url": "x"}, ensure_ascii=False) for t in stories[shard * 40 :][:40]]
        data = ("\n".join(lines) + "\n").encode()
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        paths.append(path)
    return paths


@pytest.fixture
def text_folder(tmp_path: Path, stories: list[str]) -> Path:
    """Plain text files, one story each, in two folders."""
    folder = tmp_path / "texts"
    for number, text in enumerate(stories[:40]):
        path = folder / ("x", "y")[number % 2] / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder
