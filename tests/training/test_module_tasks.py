"""Validation figures against a direct computation, and what the module wires together."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.training import rng
from subspace_lab.training.tasks import LanguageModeling, ValidationSums


class Bigram(nn.Module):
    """A causal model in the Hugging Face manner: labels are shifted inside, the loss is the mean over targets."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> SimpleNamespace:
        logits = self.table(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, logits=logits)


def batches(padding: bool) -> list[dict[str, torch.Tensor]]:
    made = []
    for rows, seed in ((4, 0), (4, 1), (1, 2)):
        ids = torch.randint(0, 11, (rows, 8), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        if padding:
            labels[:, 3 + seed :] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.mark.parametrize("padding", [False, True])
def test_validation_is_token_weighted(padding: bool) -> None:
    torch.manual_seed(0)
    model, task, sums = Bigram(), LanguageModeling(), ValidationSums()
    nll, count, means = 0.0, 0, []
    for batch in batches(padding):
        sums.add(*task.loss_and_count(model, batch))
        logits = model(**batch).logits.double()[:, :-1].log_softmax(-1)
        targets = batch["labels"][:, 1:]
        chosen = logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)[targets != -100]
        nll, count = nll - chosen.sum().item(), count + chosen.numel()
        means.append(-chosen.mean().item())
    figures = task.summary(sums.local(), bytes_per_token=3.0)
    assert figures["val/loss"] == pytest.approx(nll / count, rel=1e-6)
    assert figures["val/perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert figures["val/bits_per_byte"] == pytest.approx(nll / count / math.log(2) / 3, rel=1e-6)
    # GaLore's script divides by one batch too many.
    assert figures["val/perplexity_galore_script"] == pytest.approx(math.exp(sum(means) / 4), rel=1e-6)
    assert figures["val/perplexity"] != pytest.approx(math.exp(sum(means) / 3), rel=1e-4)  # the last batch is small


def test_sums_add_over_processes() -> None:
    torch.manual_seed(0)
    model, task = Bigram(), LanguageModeling()
    whole, halves = ValidationSums(), [ValidationSums(), ValidationSums()]
    for index, batch in enumerate(batches(True)):
        whole.add(*task.loss_and_count(model, batch))
        halves[index % 2].add(*task.loss_and_count(model, batch))
    together = task.summary(halves[0].local() + halves[1].local(), None)
    assert together["val/loss"] == pytest.approx(task.summary(whole.local(), None)["val/loss"], rel=1e-12)
    each = [half.batch_means.item() / (half.batches + 1) for half in halves]
    assert together["val/perplexity_galore_script"] == pytest.approx(math.exp(sum(each) / 2))
    assert "val/bits_per_byte" not in together


def test_a_batch_of_padding_changes_nothing_and_no_targets_give_nan() -> None:
    torch.manual_seed(0)
    model, task, sums = Bigram(), LanguageModeling(), ValidationSums()
    empty = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    sums.add(*task.loss_and_count(model, empty))
    assert math.isnan(task.summary(sums.local(), None)["val/loss"])
    sums.add(*task.loss_and_count(model, batches(False)[0]))
    alone = ValidationSums()
    alone.add(*task.loss_and_count(model, batches(False)[0]))
    assert task.summary(sums.local(), None)["val/loss"] == task.summary(alone.local(), None)["val/loss"]


def test_divergence_is_infinite_perplexity() -> None:
    sums = ValidationSums()
    sums.add(torch.tensor(5000.0), torch.tensor(3))
    assert LanguageModeling().summary(sums.local(), None)["val/perplexity"] == math.inf


def test_random_states_survive_a_safe_checkpoint(tmp_path: Any) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    rng.seed(3)
    draw()
    torch.save(rng.get_state(), tmp_path / "rng.pt")
    expected = draw() + draw()
    rng.seed(99)
    rng.set_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() + draw() == expected
    rng.seed(3)
    draw()
    assert draw() + draw() == expected


def test_accumulation_and_clipping_reach_the_optimizer(tiny: Any) -> None:
    """Two micro-batches of 2 rows are one batch of 4, and clipping changes what is learnt."""
    tiny.fit("one", "trainer.max_steps=4", "method=none")
    tiny.fit("two", "trainer.max_steps=4", "method=none", "data.batch_size=2")
    tiny.fit("clipped", "trainer.max_steps=4", "method=none", "optimizer=sgd", "trainer.gradient_clip_val=1e-9")
    one, two = (tiny.rows(name) for name in ("one", "two"))
    assert [r["train/tokens"] for r in one] == [r["train/tokens"] for r in two]
    assert [float(r["train/loss"]) for r in one] == pytest.approx([float(r["train/loss"]) for r in two], rel=1e-5)
    losses = [float(r["train/loss"]) for r in tiny.rows("clipped")]
    start = float(one[0]["train/loss"])
    assert losses[0] == start and abs(float(tiny.rows("clipped")[-1]["val/loss"]) - start) < 0.2


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision_trains(tiny: Any, precision: str) -> None:
    full = tiny.fit("full", "scheduler=constant").metrics["val/loss"]
    low = tiny.fit("low", "scheduler=constant", f"trainer.precision={precision}").metrics["val/loss"]
    assert low == pytest.approx(full, rel=0.05)


def test_after_step_runs_once_per_optimizer_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_lab.methods.galore import GaLore

    calls: list[int] = []
    monkeypatch.setattr(GaLore, "after_step", lambda self, optimizer: calls.append(1))
    tiny.fit("run", "trainer.max_steps=3", "data.batch_size=2")
    assert len(calls) == 3


def test_per_layer_updates_train_like_the_whole_step(tiny: Any) -> None:
    whole = tiny.fit("whole", "scheduler=constant").metrics["val/loss"]
    layers = tiny.fit("layers", "scheduler=constant", "method.per_layer=true").metrics["val/loss"]
    assert layers == pytest.approx(whole, rel=1e-4)


def test_early_stopping_stops_and_saves(tiny: Any) -> None:
    from subspace_lab.training import checkpoint

    words = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=9")
    outcome = tiny.fit("run", *words, "trainer.val_every=2", "trainer.max_steps=50")
    assert outcome.timing["steps"] == 4
    assert checkpoint.step_of(checkpoint.list_checkpoints(tiny.root / "run")[0]) == 4
