"""`SequenceToSequence`: answering prompts, with an encoder and a decoder or with a model that continues a text.

The published figures of the T5 benchmarks and of TRACE are scored on what the model writes by itself, so the accuracy
is that of greedy decoding, not of the best among the label words: an answer that is no label at all counts as wrong,
which is how much of what a model forgets shows (sequential fine-tuning's 7.4 % on fifteen tasks is below chance).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subspace_lab.data.packing import IGNORE
from subspace_lab.data.tokenization import Tokenizer
from subspace_lab.training.tasks import Batch
from subspace_lab.training.text_scores import METRICS, Metric, score

_MATCHES = {"exact_match", "exact_text", "first_character"}


class SequenceSums:
    """Summed loss over target tokens, target tokens, scores and examples (float64, 4)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, sums: Tensor) -> None:
        """Add the four sums of one batch (float64, (4,))."""
        self.values += sums

    def local(self) -> Tensor:
        """Return the four sums."""
        return self.values


class SequenceToSequence:
    """Text for text.

    Batches are those of `TextPairs`: prompts in "input_ids" with "attention_mask", answers in "labels"; for a causal
    model the answer is in "input_ids" too, after the prompt, and labels are -100 on the prompt. "metric" (b,), if
    there, says by which of `METRICS` each example is scored.

    Args:
        tokenizer: turns what the model writes into text.
        metric: the score of examples that do not say.
        target_length: most tokens of an answer where more than a match is scored.
    """

    unit: ClassVar[str] = "examples"
    headline: ClassVar[tuple[str, str]] = ("val/accuracy", "val acc")

    def __init__(self, tokenizer: Tokenizer, metric: Metric = "exact_match", target_length: int = 16) -> None:
        self._tokenizer, self._metric, self._target_length = tokenizer, metric, target_length

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model on prompts and answers and return logits and what they should have been.

        Returns:
            logits (b, T, vocabulary) and labels (b, T), -100 where nothing is predicted.
        """
        labels = batch["labels"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        config: Any = model.config
        if not config.is_encoder_decoder:
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits[:, :-1], labels[:, 1:]
        # What the decoder has read before each token: its start, then the answer (transformers' own shift).
        pad, start = config.pad_token_id, config.decoder_start_token_id
        before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        before = before.masked_fill(before == IGNORE, pad)
        return model(**inputs, decoder_input_ids=before, use_cache=False).logits, labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats over the batch's target tokens, fp32."""
        logits, labels = self.forward(model, batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return the sums over the batch of loss (nats), target tokens, scores and examples (float64, (4,)).

        Answers are decoded greedily and compared as text on the host.
        """
        logits, labels = self.forward(model, batch)
        nll = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        there = (batch["labels"] != IGNORE).any(1)
        rows = there.nonzero().flatten()
        scores = 0.0
        if len(rows):
            scores = sum(self.scores(model, {name: tensor[rows] for name, tensor in batch.items()}))
        sums = [nll.double(), (labels != IGNORE).sum().double(), nll.new_tensor(scores).double(), there.sum().double()]
        return (torch.stack(sums),)

    def scores(self, model: nn.Module, batch: Batch) -> list[float]:
        """Return the score in [0, 1] of each example, by what the model writes."""
        numbers = (
            batch["metric"].tolist() if "metric" in batch else [METRICS.index(self._metric)] * len(batch["labels"])
        )
        metrics = [METRICS[number] for number in numbers]
        prompts, mask = self._prompts(model, batch)
        wanted = self._texts(batch["labels"], batch["labels"] != IGNORE)
        sources = self._texts(prompts, mask.bool()) if "sari" in metrics else [""] * len(wanted)
        answers = self.answers(model, prompts, mask, self._most(batch["labels"], metrics))
        return [score(*each) for each in zip(metrics, answers, wanted, sources, strict=True)]

    def answers(self, model: nn.Module, prompts: Tensor, mask: Tensor, most: int) -> list[str]:
        """Return what the model writes, greedily, in at most `most` tokens.

        Args:
            model: a transformers model that generates.
            prompts: int64 (b, T), for a causal model filled up on the left.
            mask: int64 (b, T).
            most: number of tokens.
        """
        from transformers import GenerationConfig

        config: Any = model.config
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            eos_token_id=self._tokenizer.eos_id,
            pad_token_id=self._tokenizer.pad_id,
            decoder_start_token_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
        )
        generating: Any = model
        with torch.no_grad():
            ids = generating.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
        ids = ids[:, 1:] if config.is_encoder_decoder else ids[:, prompts.shape[1] :]
        ended = (ids == self._tokenizer.eos_id).cumsum(1) > 0
        return self._texts(ids, ~ended)

    def _prompts(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompts alone; a causal model's moved to the right, where it goes on."""
        ids, mask, config = batch["input_ids"], batch["attention_mask"], getattr(model, "config", None)
        if config is None or config.is_encoder_decoder:
            return ids, mask
        prompt = (mask == 1) & (batch["labels"] == IGNORE)
        columns = torch.arange(ids.shape[1], device=ids.device)
        places = (columns + prompt.sum(1, keepdim=True)) % ids.shape[1]
        width = int(prompt.sum(1).max())
        return ids.gather(1, places)[:, -width:], prompt.gather(1, places).long()[:, -width:]

    def _texts(self, ids: Tensor, real: Tensor) -> list[str]:
        rows = zip(ids.tolist(), real.tolist(), strict=True)
        kept = [[token for token, there in zip(*row, strict=True) if there] for row in rows]
        return [self._tokenizer.decode(row).strip() for row in kept]

    def _most(self, labels: Tensor, metrics: list[Metric]) -> int:
        """Tokens that can matter: an answer longer than every reference matches none."""
        if set(metrics) <= _MATCHES:
            return int((labels != IGNORE).sum(1).max())
        return self._target_length

    def size(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def sums(self, device: torch.device) -> SequenceSums:
        """Return sums of nothing."""
        return SequenceSums(device)

    def figures(self, total: Tensor, part: str) -> dict[str, float]:
        """Return <part>/loss (nats per target token) and <part>/accuracy (mean score, a fraction)."""
        nll, tokens, scores, examples = total.tolist()
        return {
            f"{part}/loss": nll / tokens if tokens else math.nan,
            f"{part}/accuracy": scores / examples if examples else math.nan,
        }
