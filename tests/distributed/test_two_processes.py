"""Two processes over gloo learn what one does with the same global batch: every method family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.cases import CASES, TWO, Case
from distributed.harness import Processes, rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors

pytestmark = pytest.mark.timeout(600)  # beyond the harness's own limits, which say more

# Figures of the clock and of this process, and one that is defined by how many batches each process validates on.
OTHERWISE = ("seconds", "per_second", "refresh_share", "galore_script")


def marked(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=() if case.fast else pytest.mark.slow)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, two tasks of text for text, and pairs of sentences."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"document {i}: {'abcdefgh'[i % 8] * (i % 13)} the quick brown fox {i * i}" for i in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for task, answers in {"first": ("yes", "not"), "second": ("good", "poor")}.items():
        (folder / "tasks" / task).mkdir(parents=True)
        for part, numbers in {"train": range(40), "test": range(40, 53)}.items():
            pairs = [{"source": f"number {i}", "target": answers[i % 2]} for i in numbers]
            (folder / "tasks" / task / f"{part}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "glue" / "MRPC").mkdir(parents=True)
    for part, numbers in {"train": range(80), "dev": range(80, 107)}.items():
        rows = [f"{i % 2}\t1\t2\tthe cat {i} sleeps\ta cat is {('awake', 'asleep')[i % 2]}" for i in numbers]
        header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        (folder / "glue" / "MRPC" / f"{part}.tsv").write_text("\n".join([header, *rows, ""]))
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "cat", "is", "sleeps", "awake", "asleep")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_they_learn_what_one_does(case: Case, processes: Processes, texts: Path) -> None:
    words = [word.replace("FOLDER", str(texts)) for word in case.words]
    one = [*words, "trainer=cpu", f"data.batch_size={2 * case.batch}", *case.one]
    two = [*words, *TWO, f"data.batch_size={case.batch}", *case.two]
    told = processes.run(case.name, {"alone": one, "pair": two})
    for name, answer in told.items():
        assert "error" not in answer, f"{name}: {answer['traceback']}"
    alone, first, second = told["alone"], told["rank0"], told["rank1"]
    if "trainer.strategy=fsdp" in case.two:  # each process has its part of the moments
        halves = [answer["metrics"].pop("optimizer/state_bytes") for answer in (alone, first)]
        assert halves[1] < 0.75 * halves[0]

    # Both processes have the same model, and the same of what is kept from old tasks, to the last bit.
    assert first["trained_digests"] == second["trained_digests"]  # after each training
    assert bool(first["trained_digests"]) == (first["timing"]["steps"] > 0)
    assert first["weights_digest"] == second["weights_digest"]
    assert first["method_digest"] == second["method_digest"]

    left, right = (rows(processes.place(case.name, team)) for team in ("alone", "pair"))
    apart = differences(left, right)
    apart |= {f"final {n}": v for n, v in differences([alone["metrics"]], [first["metrics"]]).items()}
    beyond = {name: value for name, value in apart.items() if not value <= case.figures}
    print(f"\n{case.name}: figures differ by {max(apart.values()):.1e} ({max(apart, key=lambda n: apart[n])})")
    assert not beyond
    for kind in ("accuracy_matrix", "ranks", "dimensions", "examples"):
        found = [answer["sections"].get("continual", {}).get(kind) for answer in (alone, first, second)]
        assert found[0] == found[1] == found[2], kind

    a, b = (np.load(processes.place(case.name, t) / f"{n}.npz") for t, n in (("alone", "alone"), ("pair", "rank0")))
    assert set(a) == set(b)
    distance = math.sqrt(sum(np.square(a[n] - b[n]).sum() for n in a) / sum(np.square(a[n]).sum() for n in a))
    print(f"{case.name}: weights differ by {distance:.1e}")
    assert distance <= case.weights


def differences(left: list[dict[str, float]], right: list[dict[str, float]]) -> dict[str, float]:
    """The largest relative difference of each figure; rows and their columns must be the same."""
    assert [row.get("step") for row in left] == [row.get("step") for row in right]
    worst: dict[str, float] = {}
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in (name for name in a if not any(word in name for word in OTHERWISE)):
            worst[name] = max(worst.get(name, 0.0), abs(a[name] - b[name]) / max(abs(a[name]), 0.1))
    return worst
