"""GLUE's tasks: prompts, first tokens, adapters and whole models by task, and Concrete on a small T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Command, command  # noqa: F401
from omegaconf import OmegaConf

from subspace_lab.data.glue_tasks import TASKS, GlueTasks
from subspace_lab.errors import UserError
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.models.first_token import AnswerHead, FirstToken, build_first_token, read_tuned

CHOSEN = ("cola", "mnli", "qnli")
WORDS = ["acceptable", "unacceptable", "entailment", "neutral", "contradiction", "yes", "no", "cats", "sleep", "green"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (with a tokenizer of whole words), tuned/<task>, data/glue_tasks/<task>/<split>."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    root = tmp_path_factory.mktemp("glue")
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    vocabulary = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = T5Config(
        vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, decoder_start_token_id=0, pad_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(root / "base")
    tokenizer.save(str(root / "base" / "tokenizer.json"))
    for number, task in enumerate(CHOSEN):
        tuned = AutoModelForSeq2SeqLM.from_pretrained(root / "base")
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(0.05 * torch.randn_like(p))
        tuned.save_pretrained(root / "tuned" / task)
        for split, count in (("train", 20), (TASKS[task].test, 9)):
            classes = len(TASKS[task].words)
            rows: dict[str, list[Any]] = {
                name: [f"cats sleep {'green ' * (k % 4)}" for k in range(count)]
                for name in ("sentence", "question", "premise", "hypothesis")
            }
            rows["label"] = [k % classes for k in range(count)]
            datasets.Dataset.from_dict(rows).save_to_disk(str(root / "data" / "glue_tasks" / task / split))
    return root


def suite(place: Path, **options: Any) -> GlueTasks:
    given: dict[str, Any] = {"tokenizer": str(place / "base"), "validation": 5, "data_dir": str(place / "data")}
    return GlueTasks(list(CHOSEN), **(given | options))


def test_prompts_are_cut_filled_up_and_end_in_the_end(place: Path) -> None:
    task = suite(place).made[1][0]
    assert (task.name, task.classes) == ("cola", 3)
    assert [len(part) for part in (task.parts.train, task.parts.validation, task.parts.test)] == [15, 5, 9]
    batch = task.parts.test.batch(np.arange(4))
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    widths = batch["inputs"].ne(0).sum(1)
    assert batch["inputs"].shape[1] % 8 == 0
    assert (widths[1:] == widths[:-1] + 1).all()  # one more word each
    for row, width in zip(batch["inputs"], widths, strict=True):
        assert row[width - 1] == 1
        assert (row[width:] == 0).all()
    short = suite(place, length=48).made[1][2].parts.test.batch(np.arange(9))
    assert short["inputs"].shape[1] <= 48


def test_prompts_of_a_file(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"cola": "{sentence} yes", "mnli": "{premise}", "qnli": "{question}"}))
    given = suite(place, prompts=str(file))
    assert given.made[1][0].parts.test.batch(np.arange(1))["inputs"][0, :5].tolist() == [10, 11, 8, 1, 0]
    assert (given.own_prompts, suite(place).own_prompts) == (False, True)
    assert given.describe()["prompts"]["mnli"] == "{premise}"
    file.write_text(json.dumps({"cola": "{sentence}"}))
    with pytest.raises(UserError, match="no prompt for 'mnli'"):
        suite(place, prompts=str(file))


def test_first_tokens_are_those_that_the_model_would_write(place: Path) -> None:
    model = build_first_token(path=str(place / "base"))
    assert isinstance(model, FirstToken)
    ids = torch.tensor([[10, 11, 1, 0], [12, 1, 0, 0]])
    with torch.no_grad():
        logits = model.eval()(ids)
    written: Any = model.model
    answer = written.generate(ids, attention_mask=ids.ne(0).long(), max_new_tokens=1, do_sample=False)
    assert logits.argmax(1).tolist() == answer[:, 1].tolist()
    alone = model(ids[1:, :2])
    torch.testing.assert_close(alone[0], logits[1], rtol=1e-4, atol=1e-5)


def test_anything_else_is_one_class() -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    found = AnswerHead([3, 7])(logits).softmax(1)
    p = logits.softmax(1)
    torch.testing.assert_close(found[:, :2], p[:, [3, 7]])
    torch.testing.assert_close(found[:, 2], 1 - p[:, 3] - p[:, 7])
    with pytest.raises(UserError, match="begin with the same token"):
        AnswerHead([3, 3])


@pytest.mark.slow
def test_adapters_and_whole_models(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    adapter = tmp_path / "adapter"
    adapted: Any = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(place / "base"), LoraConfig(r=2, target_modules=["q", "v"])
    )
    for name, p in adapted.named_parameters():
        if "lora" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    adapted.save_pretrained(adapter)
    base = build_first_token(path=str(place / "base"))
    assert isinstance(base, FirstToken)
    found = read_tuned(str(adapter), "merge.models.cola", base)
    assert found.keys() == dict(base.named_parameters()).keys()
    moved = [name for name, p in base.named_parameters() if not torch.equal(p, found[name])]
    assert moved
    assert all(name.endswith((".q.weight", ".v.weight")) for name in moved)
    theirs = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place / "base"), adapter).eval()
    ids = torch.tensor([[10, 11, 1]])
    with torch.no_grad():
        ours = torch.func.functional_call(base.eval(), found, (ids,))
        expected = theirs(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=1, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is \(24, 16\) there and \(32, 16\)"):
        read_tuned(str(tmp_path / "other"), "merge.models.cola", base)
    with pytest.raises(UserError, match="no such folder"):
        read_tuned("/nothing/here", "merge.models.cola", base)


def test_what_does_not_fit_is_one_line(place: Path) -> None:
    cfg = OmegaConf.create({"model": {"_target_": "subspace_lab.models.first_token.build_first_token"}})
    cfg.model.path = str(place / "base")
    with pytest.raises(UserError, match="needs a fine-tuned model for each task"):
        suite(place).load(cfg, MergeSettings(), torch.device("cpu"))
    other = OmegaConf.create(
        {"model": {"_target_": "subspace_lab.models.small_vit.build_small_vit", "patch": 1, "dim": 4}}
    )
    with pytest.raises(UserError, match="are for models that answer prompts"):
        suite(place, length=48).load(other, MergeSettings(), torch.device("cpu"))
    for options, message in (
        ({"tasks": ["colla"]}, "no task 'colla'"),
        ({"tasks": ["cola", "cola"]}, "each once"),
        ({"tasks": ["cola"], "length": 4}, "length"),
    ):
        with pytest.raises(UserError, match=message):
            GlueTasks(tokenizer="bytes", **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["none", "first_order"])
def test_a_whole_merge(place: Path, tmp_path: Path, inner: str, command: Command) -> None:  # noqa: F811
    tuned = ",".join(f"{task}:{place / 'tuned' / task}" for task in CHOSEN)
    found = command(
        "experiment=merge_concrete_flan_t5_glue",
        f"method.inner={inner}",
        f"model.path={place / 'base'}",
        f"merge.base={place / 'base'}",
        f"data.tasks=[{','.join(CHOSEN)}]",
        f"data.data_dir={place / 'data'}",
        "data.validation=5",
        "~merge.models",
        f"+merge.models={{{tuned}}}",
        "method.steps=4",
        "method.adapt_steps=3",
        f"paths.output_dir={tmp_path}/run",
    )
    assert found.code == 0, found.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    section = results["merge"]
    assert section["tasks"] == list(CHOSEN)
    assert section["family"] == "fusionbench_lora_16"
    assert section["transductive"] is True
    assert len(section["merged"]["mnli"]["marginals"]) == 4
    assert section["learned"]["mask_steps"] == 4
    assert results["data"]["own_prompts"] is True
