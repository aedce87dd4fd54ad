from __future__ import annotations

import copy
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab.data.module import TextDataModule
from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.errors import UserError

BLOCK = 32


@pytest.fixture
def make(tmp_path: Path, jsonl_files: list[Path]) -> Any:
    """Fresh data modules over the same files."""

    def build(rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any) -> TextDataModule:
        options = {"files": [str(p) for p in jsonl_files], "val_fraction": 0.2, "batch_size": 4} | options
        module = TextDataModule("text", block_size=BLOCK, cache_dir=str(tmp_path / "cache"), **options)
        module.configure(rank, world_size, seed)
        module.prepare_data()
        module.setup("fit")
        return module

    return build


def take(module: TextDataModule, count: int, consume: bool = True) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        if consume:
            module.batch_consumed()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_batches_are_the_same_for_fresh_objects_and_follow_the_seed(make: Any) -> None:
    first = take(make(), 5)
    assert first[0]["input_ids"].shape == (4, BLOCK) and first[0]["input_ids"].dtype == torch.int64
    assert same(first, take(make(), 5))
    assert not same(first, take(make(seed=1), 5))
    assert same(take(make(seed=1, shuffle_seed=42), 5), take(make(seed=2, shuffle_seed=42), 5))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_resume_equals_uninterrupted(
    make: Any, jsonl_files: list[Path], num_workers: int, streaming: bool | None, packing: str
) -> None:
    options: dict[str, Any] = {"num_workers": num_workers, "streaming": streaming, "packing": packing}
    if streaming:
        names = [str(path) for path in jsonl_files]
        options |= {"files": names[:2], "val_files": names[2:], "shuffle_buffer": 10}
    whole = take(make(**options), 9)
    interrupted = make(**options)
    loader = iter(interrupted.train_dataloader())
    for _ in range(5):
        next(loader)
        interrupted.batch_consumed()
    next(loader)  # fetched ahead of the step, never used
    state = interrupted.state_dict()
    assert state["batches"] == 5
    resumed = make(**options)
    resumed.load_state_dict(state)
    assert same(take(resumed, 4), whole[5:])
    assert resumed.state_dict()["batches"] == 9
    early = TextDataModule("text", block_size=BLOCK, batch_size=4, **options_of(interrupted, options))
    early.load_state_dict(state)  # before there is any data
    early.configure(0, 1, 0)
    early.setup("fit")
    assert same(take(early, 4), whole[5:])


def options_of(module: TextDataModule, options: dict[str, Any]) -> dict[str, Any]:
    request = module._request
    fixed = {"files": request.files, "val_files": request.val_files, "val_fraction": request.val_fraction}
    return fixed | options | {"cache_dir": str(request.cache_dir)}


def test_state_is_plain_numbers(make: Any, tmp_path: Path) -> None:
    module = make()
    take(module, 3)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == module.state_dict()


def test_two_processes_see_the_batches_of_one(make: Any) -> None:
    one = take(make(batch_size=8), 6)
    two = [take(make(rank, 2, batch_size=4), 6) for rank in range(2)]
    for batch, *parts in zip(one, *two, strict=True):
        assert torch.equal(batch["input_ids"], torch.cat([part["input_ids"] for part in parts]))


def test_position_carries_over_to_another_process_count(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    two = make(0, 2, batch_size=4)
    take(two, 3)
    one = make(batch_size=8)
    one.load_state_dict(two.state_dict())
    assert same(take(one, 2), take(make(batch_size=8), 5)[3:])
    assert not caplog.records
    odd = make(batch_size=16)
    odd.load_state_dict(two.state_dict())
    assert odd.state_dict()["batches"] == 1
    assert "8 rows are read again" in caplog.text


def test_other_text_is_noticed(make: Any, jsonl_files: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    module = make()
    take(module, 2)
    state = module.state_dict()
    jsonl_files[0].write_text('{"text": "quite another text, long enough for a row or two of tokens"}\n' * 3)
    with caplog.at_level(logging.WARNING):
        make().load_state_dict(state)
    assert "differs from the checkpoint's" in caplog.text


def test_stream_of_another_worker_count_starts_a_new_pass(
    make: Any, jsonl_files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(path) for path in jsonl_files]
    options: dict[str, Any] = {"files": names[:2], "val_files": names[2:], "streaming": True, "batch_size": 2}
    module = make(**options)
    take(module, 2)
    state = module.state_dict()
    state["streams"][0].append(dict(state["streams"][0][0]))  # as written with two workers
    other = make(**options)
    other.load_state_dict(state)
    assert "newly shuffled pass" in caplog.text
    assert not same(take(other, 2), take(make(**options), 2))


def test_stream_positions_of_all_processes(make: Any, jsonl_files: list[Path], monkeypatch: Any) -> None:
    names = [str(path) for path in jsonl_files]
    options: dict[str, Any] = {"files": names[:2], "val_files": names[2:], "streaming": True}
    modules = [make(rank, 2, **options) for rank in range(2)]
    whole = [take(module, 4) for module in modules]
    assert not same(*whole)
    everyone = [module._position.streams for module in modules]

    def gather(out: list[Any], mine: Any) -> None:
        out[:] = copy.deepcopy(everyone)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    state = modules[0].state_dict()
    after = [take(module, 2) for module in modules]
    for rank in range(2):
        resumed = make(rank, 2, **options)
        resumed.load_state_dict(state)
        assert same(take(resumed, 2), after[rank])


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_validation_counts_every_token_once(make: Any, packing: str) -> None:
    module = make(packing=packing)
    batches = list(module.val_dataloader())
    rows = sum(len(batch["labels"]) for batch in batches)
    assert len(batches) == len(module.val_dataloader()) == math.ceil(rows / 4)
    assert rows % 4 and len(batches[-1]["labels"]) == rows % 4, "the short batch at the end is kept"
    counted = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    described = module.describe()["validation"]
    assert counted == described["row_tokens"]
    assert packing == "pad" or counted == described["tokens"]
    assert same(batches, list(module.val_dataloader()))
    for world_size in (2, 3):
        parts = [list(make(r, world_size, packing=packing).val_dataloader()) for r in range(world_size)]
        assert len({len(part) for part in parts}) == 1, "equally many batches on every process"
        total = sum(int((batch["labels"] != IGNORE).sum()) for part in parts for batch in part)
        assert total == counted
        assert all(len(batch["input_ids"]) for part in parts for batch in part)


def test_bits_per_byte_needs_bytes_per_token(make: Any, stories: list[str]) -> None:
    module = make()
    described = module.describe()
    assert module.bytes_per_token == pytest.approx(described["validation"]["bytes"] / described["validation"]["tokens"])
    assert described["train"]["bytes"] + described["validation"]["bytes"] == sum(len(s.encode()) for s in stories)
    assert TextDataModule().bytes_per_token is None


def test_training_leaves_the_global_random_state_alone(make: Any) -> None:
    module = make(num_workers=0)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    take(module, 3)
    list(module.val_dataloader())
    assert torch.equal(before, torch.random.get_rng_state())


def test_stdlib_text(tmp_path: Path) -> None:
    module = TextDataModule("stdlib_text", cache_dir=str(tmp_path), val_tokens=10_000)
    module.configure(0, 1, 0)
    module.setup("fit")
    (batch,) = take(module, 1)
    assert batch["input_ids"].shape == (8, 128) and int(batch["input_ids"].max()) < module.vocab_size == 257
    counted = sum(int((batch["labels"] != IGNORE).sum()) for batch in module.val_dataloader())
    assert counted == 10_000
    described = module.describe()
    assert described["train"]["documents"] > 10 * described["validation"]["documents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0: expected at least 1"),
        ({"block_size": 1}, r"data\.block_size=1: expected at least 2"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"val_fraction": 1.5}, r"data\.val_fraction=1.5"),
        ({"val_tokens": 0}, r"data\.val_tokens=0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextDataModule(**options)


def test_text_shorter_than_a_row(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"tiny {name}")
    module = TextDataModule("text", files=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"less than one row.*data\.block_size"):
        module.setup("fit")


def test_configs_fit_the_signature() -> None:
    import inspect

    import yaml

    folder = Path(__file__).parents[2] / "conf" / "data"
    names = set(inspect.signature(TextDataModule).parameters) | {"_target_"}
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))}
    ours = {name: node for name, node in nodes.items() if str(node.get("_target_")).endswith(".TextDataModule")}
    assert set(ours) == {"stdlib_text", "text", "c4", "wikitext2", "tiny_shakespeare"}
    for name, node in ours.items():
        assert set(node) <= names and node["dataset"] == name
