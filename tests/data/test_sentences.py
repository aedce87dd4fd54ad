"""GLUE files as batches, and a small BERT that learns them: made-up sentences, a tokenizer made on the spot."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab.data import glue
from subspace_lab.data.packing import Batch
from subspace_lab.data.sentences import TextClassificationDataModule
from subspace_lab.errors import UserError

ANIMALS = ["cat", "dog", "fox", "owl", "hen", "pig", "cow", "bat"]
MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def pair(index: int) -> tuple[str, str, int]:
    """Two sentences that agree (1) or not (0), with an unpaired quotation mark now and then."""
    animal, label = ANIMALS[index % 8], index // 8 % 2
    quote = '"' if index % 5 == 0 else ""
    second = f"a {animal} is {'asleep' if label else 'awake'}"
    return f"{quote}the {animal} sleeps" + " now" * (index % 4), second, label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with MRPC, RTE and SST-2 in GLUE's form and a word tokenizer."""
    parts = {"train": range(200), "dev": range(200, 248)}
    for name in ("MRPC", "RTE", "SST-2"):
        (tmp_path / "glue" / name).mkdir(parents=True)
    for part, numbers in parts.items():
        made = [pair(number) for number in numbers]
        write(tmp_path / f"glue/MRPC/{part}.tsv", MRPC_HEADER, [f"{y}\t1\t2\t{a}\t{b}" for a, b, y in made])
        words = ("entailment", "not_entailment")
        lines = [f"{i}\t{a}\t{b}\t{words[y]}" for i, (a, b, y) in enumerate(made)]
        write(tmp_path / f"glue/RTE/{part}.tsv", "index\tsentence1\tsentence2\tlabel", lines)
        write(tmp_path / f"glue/SST-2/{part}.tsv", "sentence\tlabel", [f"{a} \t{y}" for a, _, y in made])
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words_ = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        '"',
        *ANIMALS,
        *["the", "a", "sleeps", "is", "asleep", "awake", "now"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words_)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path: Path, header: str, lines: list[str]) -> None:
    path.write_bytes("\n".join([header, *lines, ""]).encode())


def make(
    folder: Path, rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any
) -> TextClassificationDataModule:
    glue.load.cache_clear()
    options = {"val_size": 20, "batch_size": 16, "tokenizer": str(folder / "tokenizer.json")} | options
    module = TextClassificationDataModule(data_dir=str(folder), **options)
    module.configure(rank, world_size, seed)
    module.setup("fit")
    return module


def take(module: TextClassificationDataModule, count: int) -> list[Batch]:
    batches = []
    for batch in itertools.islice(module.train_dataloader(), count):
        batches.append(batch)
        module.batch_consumed()
    return batches


def test_batches_are_padded_to_their_longest(folder: Path) -> None:
    module = make(folder, batch_size=2)
    assert module.model_arguments() == {"data_tokens": 20, "data_pad_id": 0, "data_classes": 2}
    lengths = set()
    for batch in take(module, 60):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and ids.dtype == mask.dtype == batch["labels"].dtype == torch.int64
        assert bool(((ids != 0) == (mask == 1)).all()) and int(mask.sum(1).max()) == ids.shape[1]
        assert bool((ids[:, 0] == 2).all()) and bool((ids == 3).sum(1).eq(2).all())  # [CLS] … [SEP] … [SEP]
        lengths.add(ids.shape[1])
    assert len(lengths) > 2
    found = module.describe()
    assert [found[part]["examples"] for part in ("train", "validation", "test")] == [180, 20, 48]
    cut = make(folder, max_length=8)
    assert max(batch["input_ids"].shape[1] for batch in take(cut, 5)) == 8


def test_sentences_arrive_whole(folder: Path) -> None:
    module = make(folder)
    (batch,) = list(module.test_dataloader())
    decoded = [module.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    for index, text in enumerate(decoded):
        first, second, label = pair(200 + index)
        assert text.replace(" ", "") == (first + second).replace(" ", "")
        assert batch["labels"][index] == label


def test_resume_is_exact(folder: Path) -> None:
    whole = take(make(folder), 14)
    cut = make(folder)
    take(cut, 8)
    resumed = make(folder)
    resumed.load_state_dict(cut.state_dict())
    for a, b in zip(take(resumed, 6), whole[8:], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("dataset", "segments"), [("rte", 2), ("sst2", 1)])
def test_other_tasks(folder: Path, dataset: str, segments: int) -> None:
    module = make(folder, dataset=dataset)
    (batch,) = list(module.test_dataloader())
    assert bool((batch["input_ids"] == 3).sum(1).eq(segments).all())
    expected = [pair(index)[2] for index in range(200, 248)]
    assert batch["labels"].tolist() == expected


def test_incomplete_lines_are_left_out_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "glue/MRPC/dev.tsv"
    path.write_bytes(path.read_bytes() + b"1\t1\t2\tonly one sentence\n")
    with caplog.at_level(logging.WARNING):
        module = make(folder)
    assert module.describe()["test"]["examples"] == 48 and "1 of 49 lines are incomplete" in caplog.text


def test_what_is_missing_is_one_line(folder: Path, tmp_path: Path) -> None:
    def refuses(pattern: str, **options: Any) -> None:
        with pytest.raises(UserError, match=pattern) as told:
            make(folder, **options)
        assert "\n" not in str(told.value)

    refuses(
        r"data=qqp: no train\.tsv and dev\.tsv in .*glue/QQP, and cannot read nyu-mll/glue.*SUBSPACE_DATA",
        dataset="qqp",
    )
    refuses(r"data\.tokenizer has no value", tokenizer=None)
    refuses(
        r"data\.tokenizer=no-such-model: no such path.*HF_HUB_OFFLINE|cannot read 'no-such-model'",
        tokenizer="no-such-model",
    )
    refuses(r"data\.dataset=cola: no such task", dataset="cola")
    refuses(r"data\.max_length=3", max_length=3)
    refuses(r"leaves nothing to train on: mrpc has 200", val_size=200)
    (folder / "tokenizer.json").write_text("{}")
    refuses(r"is no tokenizer that transformers reads")
    write(folder / "glue/MRPC/dev.tsv", "Label\tA\tB", ["1\ta\tb"])
    refuses(r"MRPC/dev\.tsv: no column '#1 String' \(its first line has: Label, A, B\)")


def fit(folder: Path, run: str, *words: str) -> Any:
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.fit import Fit

    glue.load.cache_clear()
    run_dir = folder / run
    run_dir.mkdir()
    fixed = [f"paths.data_dir={folder}", f"paths.cache_dir={folder}/cache", f"paths.output_dir={run_dir}"]
    fixed += [
        "data=mrpc",
        "data.val_size=20",
        "data.batch_size=16",
        "method=none",
        "trainer=cpu",
        "trainer.progress=off",
    ]
    return Fit().run(compose_config([*fixed, *words]), run_dir, label="x", resume_dir=run_dir)


def test_a_small_bert_learns_from_files(folder: Path) -> None:
    words = ("model=bert_tiny", f"data.tokenizer={folder}/tokenizer.json", "model.num_layers=1", "export=true")
    outcome = fit(folder, "run", *words, "trainer.max_steps=60", "optimizer.lr=0.003")
    assert {"val/accuracy", "val/loss", "test/accuracy", "test/loss"} <= outcome.metrics.keys()
    assert outcome.metrics["test/accuracy"] > 0.8  # a coin gives 0.5
    assert outcome.timing["examples"] == 60 * 16

    # What was exported is a folder that a pretrained run starts from; its head is kept, a missing one is drawn anew.
    again = fit(folder, "again", "model=bert_base", f"model.path={folder}/run/export", words[1], "trainer.max_steps=1")
    assert again.metrics["test/accuracy"] > 0.8


def test_a_missing_head_is_drawn_from_the_seed(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    from subspace_lab.models.text_classifiers import build_pretrained

    config = BertConfig(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(folder / "encoder")

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = build_pretrained(path=str(folder / "encoder"), data_tokens=19, data_classes=2)
        return dict(model.named_parameters())["classifier.weight"].detach()

    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))
    assert 0.01 < float(head(1).std()) < 0.03
    with pytest.raises(UserError, match=r"has 19 token embeddings, data\.tokenizer 30 tokens"):
        build_pretrained(path=str(folder / "encoder"), data_tokens=30, data_classes=2)
    with pytest.raises(UserError, match=r"model\.path=/no/such: no such folder"):
        build_pretrained(path="/no/such", data_tokens=19, data_classes=2)
    with pytest.raises(UserError, match=r"cannot read model\.path=nobody/nothing"):
        build_pretrained(path="nobody/nothing", data_tokens=19, data_classes=2)
