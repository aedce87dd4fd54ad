"""Text tasks: files in every layout, prompts and answers as tokens, orders, exact resumption, errors of one line."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.data.packing import Batch
from subspace_lab.data.text_catalog import ORDERS, TASKS, resolve_order
from subspace_lab.data.text_hub import SETS, hub_pairs
from subspace_lab.data.text_sequence import TextSequence
from subspace_lab.data.text_tasks import TextTaskDataModule
from subspace_lab.data.tokenization import ByteTokenizer
from subspace_lab.errors import UserError

TOPICS = TASKS["agnews"].labels


def topic(index: int) -> dict[str, str]:
    return {"sentence": f"Text number {index} " + "long " * (index % 7), "label": TOPICS[index % 4]}


def mood(index: int) -> dict[str, str]:
    return {"sentence": f"film {index}", "label": ("Good", "Bad")[index % 2]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """agnews in the plain layout, sst-2 as the benchmark is published, fomc as TRACE is, own rows as csv."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part, rows in (("train", range(80)), ("test", range(80, 100))):
        write(tmp_path / f"text_tasks/agnews/{part}.jsonl", [topic(index) for index in rows])
        write(tmp_path / f"CL_Benchmark/SC/SST-2/{part}.json", [mood(index) for index in rows])
        asked = [{"prompt": f"rate {index}?", "answer": f"{index / 2}"} for index in rows]
        write(tmp_path / f"LLM-CL-Benchmark_5000/FOMC/{part}.json", asked)
        path = tmp_path / f"text_tasks/mine/{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "target"])
            writer.writerows([f"say, {index}", f"line {index}\nand more"] for index in rows)
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    one_by_one = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if one_by_one else json.dumps(rows))


def make(folder: Path, *order: str, rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any) -> TextSequence:
    options = {"train_per_class": None, "source_length": 200, "target_length": 40, "batch_size": 4} | options
    sequence = TextSequence(order=order or ("agnews", "sst-2"), data_dir=str(folder), **options)
    sequence.configure(rank, world_size, seed)
    sequence.setup("fit")
    return sequence


def take(module: TextTaskDataModule, count: int) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        module.batch_consumed()
    return batches


def texts(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    tokenizer = ByteTokenizer()
    return [tokenizer.decode(int(i) for i, m in zip(*row, strict=True) if m) for row in zip(ids, mask, strict=True)]


def test_prompts_and_answers_arrive_whole(folder: Path) -> None:
    sequence = make(folder, "AGNews", "sst-2", "fomc", "mine")
    assert sequence.names == ["agnews", "sst-2", "fomc", "mine"]
    assert [len(module.parts.test) for module in sequence.modules()] == [20] * 4
    for name, module in sequence.members.items():
        batches = list(module.test_dataloader())
        prompts = [text for b in batches for text in texts(b["input_ids"], b["attention_mask"])]
        answers = [text for b in batches for text in texts(b["labels"].clamp(min=0), b["labels"] != -100)]
        for index, prompt, answer in zip(range(80, 100), prompts, answers, strict=True):
            if name == "agnews":
                options = "World, Sports, Business, Science or Technology"
                sentence, label = topic(index).values()
                assert prompt.startswith(TASKS[name].question) and f"Options: {options}\n{sentence.strip()}\n" in prompt
                assert prompt.endswith("Answer:") and answer == label
            elif name == "sst-2":
                assert f"\nfilm {index}\n" in prompt and answer == mood(index)["label"]
            else:
                assert (prompt, answer) == (
                    (f"rate {index}?", str(index / 2))
                    if name == "fomc"
                    else (f"say, {index}", f"line {index}\nand more")
                )


@pytest.mark.parametrize("form", ["seq2seq", "causal"])
def test_batches_have_one_shape_and_end_with_the_end_of_text(folder: Path, form: str) -> None:
    module = make(folder, form=form).members["agnews"]
    shapes = set()
    for batch in take(module, 20):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert ids.dtype == mask.dtype == labels.dtype == torch.int64
        shapes.add((ids.shape, mask.shape, labels.shape))
        count = mask.sum(1)
        assert bool((mask == (torch.arange(mask.shape[1]) < count[:, None])).all())  # filled up on the right
        assert bool((ids.gather(1, count[:, None] - 1) == 256).all())
        if form == "seq2seq":
            assert bool((labels == 256).any(1).all())
        else:
            told = labels != -100
            assert bool((ids[told] == labels[told]).all()) and bool((told.int() <= mask).all())
            assert texts(ids, mask & ~told)[0].endswith("Answer:")
    assert len(shapes) == 1


def test_long_prompts_keep_their_ends(folder: Path) -> None:
    module = make(folder, source_length=40, target_length=5).members["agnews"]
    for batch in take(module, 5):
        assert batch["input_ids"].shape == (4, 40) and batch["labels"].shape[1] == 8
        for prompt in texts(batch["input_ids"], batch["attention_mask"]):
            assert prompt.startswith("Which topic") and prompt.endswith("\nAnswer:") and len(prompt) == 39
        answers = texts(batch["labels"].clamp(min=0), batch["labels"] != -100)
        assert set(answers) <= {label[:4] for label in TOPICS}


def test_resume_is_exact_and_every_task_has_its_own_order(folder: Path) -> None:
    whole = take(make(folder).members["agnews"], 30)
    cut = make(folder)
    take(cut.members["agnews"], 17)
    resumed = make(folder)
    resumed.members["agnews"].load_state_dict(cut.members["agnews"].state_dict())
    for a, b in zip(take(resumed.members["agnews"], 13), whole[17:], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(whole[0]["input_ids"], take(make(folder, seed=1).members["agnews"], 1)[0]["input_ids"])


def test_processes_share_a_batch(folder: Path) -> None:
    one = take(make(folder, batch_size=8).members["agnews"], 6)
    two = [take(make(folder, rank=rank, world_size=2).members["agnews"], 6) for rank in (0, 1)]
    for index, batch in enumerate(one):
        assert torch.equal(batch["labels"], torch.cat([rank[index]["labels"] for rank in two]))


def test_training_examples_are_limited_in_proportion(folder: Path) -> None:
    sequence = make(folder, train_per_class=5, val_size=4)
    agnews = sequence.members["agnews"].parts
    assert [len(part) for part in (agnews.train, agnews.validation, agnews.test)] == [16, 4, 20]
    assert np.bincount(sequence.members["agnews"].parts.train.targets).tolist() == [4, 4, 4, 4]  # type: ignore[attr-defined]
    again = make(folder, train_per_class=5, val_size=4, seed=7)
    assert again.members["agnews"].parts.train.identity() == agnews.train.identity()
    other = make(folder, train_per_class=6, val_size=4)
    assert other.members["agnews"].parts.train.identity() != agnews.train.identity()


def test_as_the_scenario_and_the_context_see_it(folder: Path) -> None:
    from subspace_lab.continual.sequences import DomainSequence

    sequence = make(folder)
    tasks = DomainSequence().build(sequence, 0)
    assert [task.name for task in tasks] == ["agnews", "sst-2"]
    drawn = [b["labels"] for b in tasks[1].data.draw(10, 4, 3, "bases")]
    assert [len(labels) for labels in drawn] == [4, 4, 2]
    assert torch.equal(torch.cat(drawn), torch.cat([b["labels"] for b in tasks[1].data.draw(10, 4, 3, "bases")]))
    assert sum(len(b["labels"]) for b in tasks[1].data.draw(None, 64, 3, "bases")) == 80
    together = take(sequence, 40)  # type: ignore[arg-type]
    seen = {text for batch in together for text in texts(batch["input_ids"], batch["attention_mask"])}
    assert len(seen) == 160  # one pass over both, in batches of one shape
    assert len({batch["input_ids"].shape for batch in together}) == 1
    assert sequence.describe()["order"] == ["agnews", "sst-2"]


def test_scores_differ_only_where_they_must(folder: Path) -> None:
    same, mixed = make(folder), make(folder, "agnews", "fomc")
    assert "metric" not in take(same.modules()[0], 1)[0]
    numbers = [int(take(module, 1)[0]["metric"][0]) for module in mixed.modules()]
    assert numbers[0] != numbers[1]
    blank, words = mixed.blank_batch()
    assert blank["input_ids"].shape == (4, 200) and words == "4 prompts of 200 and answers of 40 tokens"
    assert same.model_arguments() == {"data_form": "seq2seq", "data_sequence_tokens": 257, "data_pad_id": 256}
    assert make(folder, form="causal").model_arguments()["data_vocab_size"] == 257


def test_unlabelled_rows_are_left_out_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "text_tasks/agnews/test.jsonl"
    path.write_text(path.read_text() + json.dumps({"sentence": "nobody agreed", "label": "-"}) + "\n")
    (folder / "text_tasks/agnews/test.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with caplog.at_level(logging.WARNING):
        sequence = make(folder)
    assert len(sequence.members["agnews"].parts.test) == 20 and "1 of 21 rows have no label" in caplog.text


def test_what_is_wrong_is_one_line(folder: Path) -> None:
    def refuses(pattern: str, *order: str, **options: Any) -> None:
        with pytest.raises(UserError, match=pattern) as told:
            make(folder, *order, **options)
        assert "\n" not in str(told.value)

    refuses(r"data\.order: no task 'agnew' \(did you mean 'agnews'\?\)", "agnew")
    refuses(r"data\.order has 'agnews' more than once", "agnews", "AGNews")
    refuses(
        r"no amazon/train\.jsonl below .*text_tasks.*SUBSPACE_DATA\); tasks there: agnews, .*prepare_text", "amazon"
    )
    refuses(r"no dbpedia/train\.jsonl below .*cannot read task dbpedia from the Hugging Face hub \(HF_HUB", "dbpedia")
    refuses(r"no agnews/train\.jsonl below .*elsewhere", root=str(folder / "elsewhere"))
    refuses(r"data\.source_length=3: expected at least 16", source_length=3)
    refuses(r"data\.form=decoder: no such form", form="decoder")
    refuses(r"data\.val_size=80 leaves nothing to train on: agnews has 80", val_size=80)
    with pytest.raises(UserError, match=r"data\.order=order_7: no such order \(did you mean 'order_"):
        resolve_order("order_7")
    path = folder / "text_tasks/agnews/train.jsonl"
    rows = path.read_text()
    path.write_text(rows + json.dumps({"sentence": "x", "label": "Sport"}) + "\n")
    refuses(r"train\.jsonl: row 81 has label 'Sport', which agnews has not \(did you mean 'Sports'\?\)")
    path.write_text(json.dumps({"words": "x", "class": "y"}) + "\n")
    refuses(r"train\.jsonl: no columns 'sentence' and 'label' or .*its first row has: words, class")
    path.write_text("{broken\n")
    refuses(r"train\.jsonl cannot be read")
    path.write_text("")
    refuses(r"train\.jsonl: no rows")
    path.write_text(rows)
    (folder / "text_tasks/agnews/test.jsonl").unlink()
    refuses(r"agnews has no test part")


def test_orders_are_the_published_ones() -> None:
    assert {len(ORDERS[f"order_{k}"]) for k in (1, 2, 3)} == {4} and len(ORDERS["trace"]) == 8
    fifteen = [frozenset(ORDERS[f"order_{k}"]) for k in (4, 5, 6)]
    assert len(set(fifteen)) == 1 and len(fifteen[0]) == 15
    assert all(name in TASKS for order in ORDERS.values() for name in order)
    assert ORDERS["order_4"][:3] == ("mnli", "cb", "wic") and ORDERS["order_6"][-1] == "wic"
    # All of them but one are on the hub, answered in the task's words.
    assert fifteen[0] - SETS.keys() == {"amazon"}
    assert all(set(found.labels) <= set(TASKS[name].labels) for name, found in SETS.items())


def test_rows_of_the_hub_read_like_those_of_the_files() -> None:
    row = {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0}
    pairs = hub_pairs(TASKS["mnli"], [row, row | {"label": -1}])
    assert pairs.targets == ["entailment"]  # -1: annotators did not agree
    assert "\nsentence 1: It rained.\nsentence 2: It was wet.\n" in pairs.sources[0]
    row = {"premise": "He fell.", "question": "cause", "choice1": "Ice.", "choice2": "Sun.", "label": 0}
    assert hub_pairs(TASKS["copa"], [row]).targets == ["A"]
    row = {"question_title": "How?", "question_content": "So.", "topic": 5}
    assert hub_pairs(TASKS["yahoo"], [row]).targets == ["Sports"]


def test_the_script_writes_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts/prepare_text_tasks.py"))["main"]
    glue = tmp_path / "glue/RTE"
    glue.mkdir(parents=True)
    for part in ("train", "dev"):
        lines = [f'{index}\tA "{index}\tB {index}\t{"not_" * (index % 2)}entailment' for index in range(12)]
        (glue / f"{part}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines, ""]))
    write(tmp_path / "sentence_tasks/subj.all.jsonl", [{"text": f"t{k}", "label": str(k % 2)} for k in range(20)])
    assert main(["--data", str(tmp_path)]) == 0
    assert "imdb         not there: imdb/train.jsonl, imdb/test.jsonl" in capsys.readouterr().out
    sequence = make(tmp_path, "rte", "subj")
    assert [(m.train_rows, len(m.parts.test)) for m in sequence.modules()] == [(12, 12), (16, 4)]
    first = next(iter(sequence.members["rte"].test_dataloader()))
    assert 'sentence 1: A "0\nsentence 2: B 0\n' in texts(first["input_ids"], first["attention_mask"])[0]
    answers = texts(first["labels"].clamp(min=0), first["labels"] != -100)
    assert answers[:2] == ["entailment", "contradiction"]
    assert main(["--data", str(tmp_path), "--tasks", "imdb"]) == 2
    assert "imdb: imdb/train.jsonl and imdb/test.jsonl not found" in capsys.readouterr().err
    assert main(["--data", str(tmp_path), "--tasks", "sub"]) == 2
    assert "did you mean 'subj'?" in capsys.readouterr().err


def test_published_figures_are_fractions_under_full_names() -> None:
    from subspace_lab.continual.metrics import DEFINITIONS
    from subspace_lab.reporting.published import lookup

    for bench in ("t5_5_tasks", "t5_15_tasks", "trace"):
        figures = [
            lookup(f"continual_text/{bench}/{name}")["metrics"] for name in ("adaptive_svd", "o_lora", "sequential")
        ]
        assert all(set(entry) <= DEFINITIONS.keys() and min(entry.values()) > -1 for entry in figures)
        finals = [entry["final_accuracy"] for entry in figures]
        assert finals == sorted(finals, reverse=True) and finals[0] < 1
