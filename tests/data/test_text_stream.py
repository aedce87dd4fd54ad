"""The streaming path, on real files through Hugging Face `datasets`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from subspace_lab.data.loaders import make_loader
from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.data.position import Position
from subspace_lab.data.streaming import StreamDataset, StreamSource, TextStream
from subspace_lab.data.tokenization import ByteTokenizer
from subspace_lab.errors import UserError

TOKENIZER = ByteTokenizer()


@pytest.fixture
def stream(jsonl_files: list[Path]) -> TextStream:
    source = StreamSource(data_files=tuple(map(str, jsonl_files)))
    return TextStream(source, TOKENIZER, 4, 48, "pack", seed=0, shuffle_buffer=16)


def take(stream: TextStream, count: int, position: Position = Position()) -> list[tuple[Batch, Position]]:  # noqa: B008
    return list(itertools.islice(stream.batches(position), count))


def documents(batches: list[Batch]) -> list[str]:
    """The documents of packed batches, in order; the last one may be cut."""
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()
    texts = bytes(i if i < 256 else 0 for i in ids).decode(errors="replace").split("\0")
    return texts


def test_an_epoch_gives_each_document_once(stream: TextStream, stories: list[str]) -> None:
    batches = []
    for batch, position in stream.batches(Position()):
        batches.append(batch)
        if position.epoch == 1:
            break
    texts = documents(batches)[: len(stories)]
    assert sorted(texts) == sorted(stories)
    assert texts != stories and sorted(texts[:40]) not in (texts[:40],), "shuffled"


def test_epochs_and_seeds_differ(stream: TextStream) -> None:
    first = documents([b for b, _ in take(stream, 10)])
    second = documents([b for b, _ in take(stream, 10, Position(epoch=1))])
    other = documents([b for b, _ in take(replace(stream, seed=1), 10)])
    assert first[:5] != second[:5] and first[:5] != other[:5]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_every_position_resumes_exactly(stream: TextStream, packing: str) -> None:
    stream = replace(stream, packing=packing)  # type: ignore[arg-type]
    whole = take(stream, 60 if packing == "pack" else 40)  # beyond the first epoch in pad mode
    for k in (0, 3, 7, 17, len(whole) - 4):
        rest = take(replace(stream), 3, whole[k][1])
        for (batch, position), (expected, place) in zip(rest, whole[k + 1 : k + 4], strict=True):
            assert position == place
            assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_padded_rows(stream: TextStream, stories: list[str]) -> None:
    by_start = {text.encode()[:47]: text for text in stories}
    for batch, _ in take(replace(stream, packing="pad"), 5):
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert bytes(ids[: length - 1].tolist()) in by_start and ids[length - 1] == TOKENIZER.eos_id
            assert torch.equal(labels[:length], ids[:length]) and (labels[length:] == IGNORE).all()


@pytest.mark.parametrize("n_streams", [2, 3, 5])
def test_streams_share_the_documents(stream: TextStream, stories: list[str], n_streams: int) -> None:
    """Fewer shards than streams (5 > 3) divides documents, else shards; either way nothing twice, nothing lost."""
    seen: list[str] = []
    for number in range(n_streams):
        one = replace(stream, stream=number, n_streams=n_streams, packing="pad", batch_size=1, block_size=2048)
        for batch, position in one.batches(Position()):
            if position.epoch > 0:
                break
            seen.append(TOKENIZER.decode(batch["input_ids"][0].tolist()))
    assert sorted(seen) == sorted(stories)


def run_workers(stream: TextStream, positions: list[Position], start: int, count: int) -> list[tuple[Batch, Position]]:
    n = len(positions)
    streams = [replace(stream, stream=i, n_streams=n) for i in range(n)]
    dataset = StreamDataset(streams, [asdict(position) for position in positions], start)
    items = itertools.islice(make_loader(dataset, None, num_workers=n), count)
    return [(batch, Position(**position)) for batch, position in items]


def test_workers_resume_exactly(stream: TextStream) -> None:
    whole = run_workers(stream, [Position(), Position()], 0, 9)
    positions = [whole[4][1], whole[3][1]]  # after five batches: stream 0 gave batches 0, 2, 4
    rest = run_workers(stream, positions, 5, 4)
    for (batch, position), (expected, place) in zip(rest, whole[5:], strict=True):
        assert position == place and torch.equal(batch["input_ids"], expected["input_ids"])
    alone = take(replace(stream, stream=1, n_streams=2), 2)
    assert torch.equal(alone[0][0]["input_ids"], whole[1][0]["input_ids"])


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": ""}\n{"text": "abc"}\n{"text": null}\n{"text": "  "}\n')
    stream = TextStream(StreamSource(data_files=(str(path),)), TOKENIZER, 1, 8, "pack", 0, 10)
    assert take(stream, 1)[0][0]["input_ids"][0].tolist() == [97, 98, 99, 256, 97, 98, 99, 256]
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        take(stream, 1)


def test_wrong_field(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"txt": "abc"}\n')
    stream = TextStream(StreamSource(data_files=(str(path),)), TOKENIZER, 1, 8, "pack", 0, 10)
    with pytest.raises(UserError, match=r"no field 'text', it has txt .*did you mean 'txt'"):
        take(stream, 1)


def test_missing_stream_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*no\.jsonl"):
        StreamSource(data_files=(str(tmp_path / "no.jsonl"),)).open()
