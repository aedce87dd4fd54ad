"""`TextTaskDataModule`: one task whose examples are prompts to be answered; `TextSequence` has several of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override

from subspace_lab.data import text_catalog
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import stratified
from subspace_lab.data.supervised import Parts, SupervisedDataModule
from subspace_lab.data.text_examples import Form, Ids, TextPairs
from subspace_lab.data.text_files import Pairs, load_folder
from subspace_lab.data.text_hub import load_hub
from subspace_lab.data.tokenization import Tokenizer
from subspace_lab.training.text_scores import METRICS

if TYPE_CHECKING:
    from subspace_lab.training.tasks import Task

_KEPT_END = 8  # tokens at the end of a prompt that is cut: it is where the answer is asked for
_ROUND = 8  # widths are multiples of this


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How texts become tokens, the same for all tasks of a sequence.

    Attributes:
        tokenizer: makes them.
        form: seq2seq: prompt and answer apart; causal: one after the other.
        source_length: most tokens of a prompt; longer ones lose tokens before their last 8.
        target_length: most tokens of an answer.
        says_metric: whether batches carry the number of their score.
    """

    tokenizer: Tokenizer
    form: Form
    source_length: int
    target_length: int
    says_metric: bool

    def sources(self, texts: list[str]) -> list[Ids]:
        """Token ids of prompts, with the end of text (seq2seq) or the beginning (causal, if there is one)."""
        bos = getattr(self.tokenizer, "bos_id", None)
        before = [bos] if self.form == "causal" and bos is not None else []
        after = [self.tokenizer.eos_id] if self.form == "seq2seq" else []
        room = self.source_length - len(before) - len(after)
        rows = []
        for ids in self.tokenizer.encode(texts):
            if len(ids) > room:
                ids = np.concatenate([ids[: room - _KEPT_END], ids[-_KEPT_END:]])
            rows.append(np.concatenate([np.asarray(before, np.uint32), ids, np.asarray(after, np.uint32)]))
        return rows

    def targets(self, texts: list[str]) -> list[Ids]:
        """Token ids of answers, with the end of text."""
        end = np.asarray([self.tokenizer.eos_id], np.uint32)
        return [np.concatenate([ids[: self.target_length - 1], end]) for ids in self.tokenizer.encode(texts)]


class TextTaskDataModule(SupervisedDataModule):
    """One task of a `TextSequence`: prompts to be answered.

    Args:
        text_task: what is asked.
        folder: of its files; None: the hub has it.
        tried: where its files were looked for.
        encoding: how texts become tokens.
        batch_size: examples per process and step.
        global_batch_size: examples per optimizer step over all processes.
        val_size: examples held out of the training part to choose models by; 0 as in `SupervisedDataModule`. The dev
            files of the T5 benchmark are its test files, so none is used.
        train_per_class: train on so many examples per possible answer on average, drawn in proportion; None: on all.
        data_dir: where data lies.
        cache_dir: unused beside the hub's own cache.
    """

    def __init__(
        self,
        text_task: text_catalog.TextTask,
        folder: Path | None,
        tried: str,
        encoding: Encoding,
        batch_size: int,
        global_batch_size: int | None = None,
        val_size: int = 0,
        train_per_class: int | None = None,
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(text_task.name, batch_size, val_size, 1.0, data_dir, cache_dir)
        self.text_task, self.encoding, self.global_batch_size = text_task, encoding, global_batch_size
        self._folder, self._tried, self._train_per_class = folder, tried, train_per_class

    @override
    def model_arguments(self) -> dict[str, Any]:
        """`data_form`, `data_sequence_tokens` (size of the vocabulary), `data_pad_id`, if causal `data_vocab_size`."""
        tokenizer = self.encoding.tokenizer
        known = {
            "data_form": self.encoding.form,
            "data_sequence_tokens": tokenizer.vocab_size,
            "data_pad_id": tokenizer.pad_id,
        }
        return known | ({"data_vocab_size": tokenizer.vocab_size} if self.encoding.form == "causal" else {})

    @override
    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros of the greatest lengths, and its shape in words."""
        source, target = self.encoding.source_length, self.encoding.target_length
        if self.encoding.form == "causal":
            source = target = source + target
        ids = torch.zeros(self.batch_size, source, dtype=torch.int64)
        labels = torch.zeros(self.batch_size, target, dtype=torch.int64)
        lengths = f"prompts of {self.encoding.source_length} and answers of {self.encoding.target_length} tokens"
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
        }, f"{self.batch_size} {lengths}"

    @override
    def task(self) -> Task:
        """To answer as asked."""
        from subspace_lab.training.sequence_task import SequenceToSequence

        return SequenceToSequence(self.encoding.tokenizer, self.text_task.metric, self.encoding.target_length)

    @override
    def _load(self) -> Parts:
        parts = load_folder(self.text_task, self._folder) if self._folder else load_hub(self.text_task, self._tried)
        numbers = {answer: number for number, answer in enumerate(sorted({t for part in parts for t in part.targets}))}
        classes = len(self.text_task.labels)
        labels = [np.asarray([numbers[t] if classes else 0 for t in part.targets], dtype=np.int64) for part in parts]
        train_texts, test_texts = parts
        if self._train_per_class is not None:
            wanted = self._train_per_class * max(1, classes)
            if wanted < len(labels[0]):
                kept = np.flatnonzero(stratified(labels[0], wanted, f"{self.dataset}/rows"))
                labels[0] = labels[0][kept]
                train_texts = Pairs(*([texts[row] for row in kept] for texts in (parts[0].sources, parts[0].targets)))
        rows, held_out = self._divide(labels[0])
        encoded = [
            (self.encoding.sources(part.sources), self.encoding.targets(part.targets))
            for part in (train_texts, test_texts)
        ]
        widths = tuple(
            -(-max(len(ids) for part in encoded for ids in part[side]) // _ROUND) * _ROUND for side in (0, 1)
        )
        train, test = (
            TextPairs(
                sources,
                targets,
                numbers_of,
                self.encoding.tokenizer.pad_id,
                self.encoding.form,
                (widths[0], widths[1]),
                METRICS.index(self.text_task.metric) if self.encoding.says_metric else None,
                f"{self.dataset}/{self.encoding.tokenizer.identity}",
            )
            for (sources, targets), numbers_of in zip(encoded, labels, strict=True)
        )
        return Parts(train.subset(rows), train.subset(held_out), test)

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        test = self.parts.test
        assert isinstance(test, TextPairs)
        return super().describe() | {
            "labels": list(self.text_task.labels),
            "metric": self.text_task.metric,
            "folder": str(self._folder) if self._folder else "hub",
            "widths": list(test.widths),
        }
