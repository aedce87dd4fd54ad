"""Sets of GLUE as prompts answered in one word, each a task of models that others have fine-tuned: nothing is trained.

A class is the first token of its word; one more class is anything else. Published figures are of text that the model
writes by itself, which has to be the word exactly; the first token stands for it. STS-B, whose answer is a number
scored by its rank, is not among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.data.hub_rows import hub_rows
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices, fixed_order, stratified
from subspace_lab.data.supervised import Parts, default_data_dir
from subspace_lab.data.task_suite import SuiteTask, TaskSuite, rows_of
from subspace_lab.data.tokenization import Tokenizer
from subspace_lab.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.merging.settings import MergeSettings

State = dict[str, Tensor]

FOLDER = "glue_tasks"
HUB = "nyu-mll/glue"
_ROUND = 8  # widths are multiples of this
_KEPT_END = 24  # tokens at the end of a prompt that is cut: it is where the answer is asked for


@dataclass(frozen=True)
class GlueTask:
    """One set.

    Attributes:
        prompt: with the names of columns in braces.
        words: that answer it, by label.
        test: the split that is reported: labels of GLUE's test splits are not public.
    """

    prompt: str
    words: tuple[str, ...]
    test: str = "validation"


_SAME = "Say yes if these two mean the same, else no: '{%s}' and '{%s}'."

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask("Is this English acceptable or unacceptable? '{sentence}'", ("unacceptable", "acceptable")),
    "mnli": GlueTask(
        "Is '{hypothesis}' an entailment of, a contradiction to, or neutral to '{premise}'?",
        ("entailment", "neutral", "contradiction"),
        "validation_matched",
    ),
    "mrpc": GlueTask(_SAME % ("sentence1", "sentence2"), ("no", "yes")),
    "qnli": GlueTask("Is '{question}' answered by '{sentence}'? Say yes or no.", ("yes", "no")),
    "qqp": GlueTask(_SAME % ("question1", "question2"), ("no", "yes")),
    "rte": GlueTask("Does '{sentence2}' follow from '{sentence1}'? Say yes or no.", ("yes", "no")),
    "sst2": GlueTask("Is this positive or negative? '{sentence}'", ("negative", "positive")),
}


class Prompts:
    """Rows of a set as prompts, written and tokenized when they are asked for.

    Args:
        rows: of the hub's data set.
        prompt: with the names of columns in braces.
        tokenizer: makes tokens of it.
        length: most tokens.
    """

    def __init__(self, rows: Any, prompt: str, tokenizer: Tokenizer, length: int) -> None:
        self._rows, self._prompt, self._tokenizer, self._length = rows, prompt, tokenizer, length

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Indices:
        """Labels int64 (n,)."""
        return np.asarray(self._rows["label"]).astype(np.int64)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` (b,): inputs int64 (b, width), filled up; the width is the longest's, rounded up."""
        found = [self._rows[int(index)] for index in indices]
        room = self._length - 1
        kept = []
        for ids in self._tokenizer.encode([self._prompt.format_map(row) for row in found]):
            short = ids if len(ids) <= room else np.concatenate([ids[: room - _KEPT_END], ids[-_KEPT_END:]])
            kept.append([*map(int, short), self._tokenizer.eos_id])
        width = -(-max(map(len, kept)) // _ROUND) * _ROUND
        inputs = torch.full((len(kept), width), self._tokenizer.pad_id)
        for row, tokens in zip(inputs, kept, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return {"inputs": inputs, "labels": torch.tensor([int(row["label"]) for row in found])}

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`: nothing is augmented."""
        return self.batch(indices)

    def identity(self) -> str:
        """The hub library's fingerprint of the rows, and how they are asked."""
        return f"{self._rows._fingerprint}/{self._prompt}"

    def select(self, indices: Indices) -> Prompts:
        """Some of them."""
        return Prompts(self._rows.select(indices), self._prompt, self._tokenizer, self._length)


class GlueTasks(TaskSuite):
    """Sets of GLUE with fine-tuned models (`merge.models`) that answer in one word.

    Args:
        tasks: keys of `TASKS`, in the order in which models are merged.
        tokenizer: the model's own: a name on the hub or a folder.
        prompts: JSON file of the prompts that the models were fine-tuned with, by task, with the names of columns in
            braces; null: prompts of our own, with which published figures do not compare.
        length: most tokens of a prompt.
        validation: rows of each training split to choose λ by.
        test: rows to report, at most; null: all.
        data_dir: where `glue_tasks/<task>/<split>` may lie; null is SUBSPACE_DATA, else ./data.

    Raises:
        UserError: no such task, one twice, numbers out of range, a file without a prompt.
    """

    has_own_models = True

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: str,
        dataset: str = "glue_tasks",
        prompts: str | None = None,
        length: int = 512,
        validation: int = 1000,
        test: int | None = None,
        data_dir: str | None = None,
    ) -> None:
        super().__init__(dataset, 1)
        for task in tasks:
            if task not in TASKS:
                raise UserError(
                    f"data.tasks: no task '{task}'", hint=did_you_mean(task, TASKS) or f"there are: {', '.join(TASKS)}"
                )
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"data.tasks={list(tasks)}: expected some tasks, each once")
        for option, value, least in (
            ("length", length, 2 * _KEPT_END),
            ("validation", validation, 1),
            ("test", 1 if test is None else test, 1),
        ):
            if value < least:
                raise UserError(f"data.{option}={value}: expected at least {least}")
        self._tasks, self._validation, self._test = list(tasks), validation, test
        self.shape = (1, 1, length)
        self._data_dir = default_data_dir(data_dir)
        self._tokenizer_name, self.own_prompts = tokenizer, prompts is None
        self._prompts = {task: TASKS[task].prompt for task in tasks} if prompts is None else _read(prompts, tasks)
        self._tokenizer: Tokenizer | None = None

    @property
    @override
    def names(self) -> list[str]:
        return list(self._tasks)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""
        if self._tokenizer is None:
            from subspace_lab.data.tokenizer_loading import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer_name, self._data_dir)
        return self._tokenizer

    @override
    def _make(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        return None, [self._task(name) for name in self._tasks]

    def _task(self, name: str) -> SuiteTask:
        train, test = (
            Prompts(
                hub_rows(name, self._data_dir / FOLDER, HUB, name, split),
                self._prompts[name],
                self.tokenizer,
                self.shape[2],
            )
            for split in ("train", TASKS[name].test)
        )
        if self._test is not None and self._test < len(test):
            test = test.select(np.sort(fixed_order(len(test), f"{name}/test")[: self._test]))
        held_out = stratified(train.labels(), min(self._validation, len(train) // 2), f"{name}/validation")
        parts = Parts(train.select(rows_of(~held_out)), train.select(rows_of(held_out)), test)
        return SuiteTask(name, len(TASKS[name].words) + 1, parts)

    @override
    def describe(self) -> dict[str, Any]:
        return super().describe() | {"prompts": dict(self._prompts), "own_prompts": self.own_prompts}

    def load(
        self, cfg: DictConfig, settings: MergeSettings, device: torch.device
    ) -> tuple[nn.Module, State, list[State], list[nn.Module]]:
        """The model, its weights, those fine-tuned on each task, and heads that look at the answers' first tokens.

        Raises:
            UserError: a model of another kind, no `merge.models`, or one that cannot be read.
        """
        from subspace_lab import build
        from subspace_lab.models.first_token import AnswerHead, FirstToken, read_tuned

        model = build.build_model_for(cfg, {"data_shape": self.shape, "data_classes": 2})
        if not isinstance(model, FirstToken):
            raise UserError(f"data={self.dataset} are for models that answer prompts", hint="model=flan_t5_base")
        if settings.models is None:
            raise UserError(
                f"data={self.dataset} needs a fine-tuned model for each task (merge.models)",
                hint="experiment=merge_concrete_flan_t5_glue names them; or merge.models={cola: /a/folder, …}",
            )
        model = model.eval().requires_grad_(False)
        if settings.base is not None and settings.base != model.path:
            model.load_state_dict(read_tuned(settings.base, "merge.base", model), strict=False)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        models = [read_tuned(settings.models[name], f"merge.models.{name}", model) for name in self._tasks]
        heads: list[nn.Module] = [AnswerHead(self._first_tokens(TASKS[name].words)) for name in self._tasks]
        return model, base, models, heads

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        return [int(ids[0]) for ids in self.tokenizer.encode(list(words))]


def _read(path: str, tasks: Sequence[str]) -> dict[str, str]:
    """Prompts by task from a JSON file.

    Raises:
        UserError: it cannot be read, or lacks a task.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.prompts={path}: cannot be read ({error})") from error
    for task in tasks:
        if not isinstance(found, Mapping) or not isinstance(found.get(task), str):
            raise UserError(f"data.prompts={path}: no prompt for '{task}'", hint='{"cola": "… {sentence} …", …}')
    return {task: str(found[task]) for task in tasks}
