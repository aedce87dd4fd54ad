"""`TextSequence`: text-to-text tasks in an order, as `scenario=domain` learns them, one after another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from subspace_lab.data import text_catalog
from subspace_lab.data.joined import JoinedExamples
from subspace_lab.data.packing import Batch
from subspace_lab.data.supervised import Parts, SupervisedDataModule
from subspace_lab.data.text_examples import Form, TextPairs
from subspace_lab.data.text_files import folders
from subspace_lab.data.text_hub import SETS
from subspace_lab.data.text_tasks import Encoding, TextTaskDataModule
from subspace_lab.data.tokenizer_loading import load_tokenizer
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.training.tasks import Task

#: folders below <data_dir> in which tasks are looked for after <dataset>: the plain layout, the benchmarks' own
_SHARED = ("text_tasks", "CL_Benchmark", "TRACE-Benchmark/LLM-CL-Benchmark_5000", "LLM-CL-Benchmark_5000")


class TextSequence(SupervisedDataModule):
    """Tasks in an order, each a `TextTaskDataModule`; all answers are text, so all tasks share the model's outputs.

    As one data set (`protocol=fit`) it has the examples of all tasks.

    Args:
        dataset: name of the sequence.
        order: a published order by its name (order_1 … order_6, trace), or the names of the tasks.
        tokenizer: the model's, see `tokenizer_loading`.
        form: seq2seq: for models with encoder and decoder; causal: for models that continue a text.
        source_length: most tokens of a prompt; longer ones lose tokens before their last 8, which ask for the answer.
        target_length: most tokens of an answer, the end of text included.
        batch_size: examples per process and step.
        global_batch_size: examples per optimizer step over all processes; the trainer reaches it by accumulation.
        val_size: examples held out of each training part to choose by; 0 as in `SupervisedDataModule`.
        train_per_class: train on so many examples per possible answer on average; null: on all.
        root: folder of the tasks' folders; null looks in <data_dir>/<dataset>, <data_dir>/text_tasks and where the
            published files are unpacked, and goes to the hub for what is not there.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: unused beside the hub's own cache; as for other data.

    Raises:
        UserError: no such order or task, lengths too small.
    """

    shared_classes = True

    def __init__(
        self,
        dataset: str = "text_5_tasks",
        order: str | Sequence[str] = "order_1",
        tokenizer: str = "bytes",
        form: Form = "seq2seq",
        source_length: int = 512,
        target_length: int = 16,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        val_size: int = 0,
        train_per_class: int | None = 1000,
        root: str | None = None,
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        for name, number, least in (
            ("source_length", source_length, 16),
            ("target_length", target_length, 2),
            ("train_per_class", 1 if train_per_class is None else train_per_class, 1),
        ):
            if number < least:
                raise UserError(f"data.{name}={number}: expected at least {least}")
        if form not in ("seq2seq", "causal"):
            raise UserError(f"data.form={form}: no such form", hint="seq2seq or causal")
        super().__init__(dataset, batch_size, val_size, 1.0, data_dir, cache_dir)
        self.global_batch_size = global_batch_size
        self._roots = [Path(root).expanduser()] if root else [self._data_dir / name for name in (dataset, *_SHARED)]
        self._order, self._form, self._tokenizer_name = text_catalog.resolve_order(order), form, tokenizer
        self._lengths, self._train_per_class = (source_length, target_length), train_per_class
        self._only_files = root is not None

    @functools.cached_property
    def _folders(self) -> dict[str, Path]:
        return folders(self._roots)

    @functools.cached_property
    def _tasks(self) -> list[text_catalog.TextTask]:
        return [text_catalog.find_task(name, list(self._folders)) for name in self._order]

    @functools.cached_property
    def encoding(self) -> Encoding:
        """How texts become tokens; loads the tokenizer when first asked for."""
        return Encoding(
            load_tokenizer(self._tokenizer_name, self._data_dir),
            self._form,
            *self._lengths,
            says_metric=len({task.metric for task in self._tasks}) > 1,
        )

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in order."""
        return [task.name for task in self._tasks]

    @functools.cached_property
    def members(self) -> dict[str, TextTaskDataModule]:
        """The tasks' data modules by name, in order."""
        self._check_files()
        return {
            task.name: TextTaskDataModule(
                task,
                self._folders.get(task.name),
                self._tried(task.name),
                self.encoding,
                self.batch_size,
                self.global_batch_size,
                self._val_size,
                self._train_per_class,
                str(self._data_dir),
                str(self._cache_dir),
            )
            for task in self._tasks
        }

    def modules(self) -> list[TextTaskDataModule]:
        """The tasks' data modules, in order."""
        return list(self.members.values())

    def _check_files(self) -> None:
        absent = [name for name in self.names if name not in self._folders]
        nowhere = [name for name in absent if self._only_files or name not in SETS]
        if nowhere:
            there = ", ".join(sorted(self._folders)) or "none"
            others = f" (nor {', '.join(nowhere[1:])})" if nowhere[1:] else ""
            raise UserError(
                f"{self._tried(nowhere[0])}{others}; tasks there: {there}",
                hint="unpack the published CL_Benchmark or LLM-CL-Benchmark_5000 there; scripts/prepare_text_tasks.py "
                "writes tasks from original files",
            )

    def _tried(self, name: str) -> str:
        places = [root for root in self._roots if root.is_dir()] or self._roots[:1]
        return f"data={self.dataset}: no {name}/train.jsonl below {' or '.join(map(str, places))} (SUBSPACE_DATA)"

    @override
    def configure(self, rank: int, world_size: int, seed: int) -> None:
        """Say which process this is and what orders the training examples; before `setup`."""
        for member in self.modules():
            member.configure(rank, world_size, seed)
        super().configure(rank, world_size, seed)

    @override
    def _load(self) -> Parts:
        for member in self.modules():
            member.setup()
        parts = [member.parts for member in self.modules()]

        def joined(name: str) -> JoinedExamples:
            return JoinedExamples(TextPairs.aligned([getattr(own, name) for own in parts]))

        return Parts(joined("train"), joined("validation"), joined("test"))

    @override
    def model_arguments(self) -> dict[str, Any]:
        """What a model may want to know of the data; no texts are read."""
        return self.modules()[0].model_arguments()

    @override
    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros of the greatest lengths, and its shape in words."""
        return self.modules()[0].blank_batch()

    @override
    def task(self) -> Task:
        """To answer as asked."""
        return self.modules()[0].task()

    @override
    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        return super().describe() | {
            "order": self.names,
            "form": self._form,
            "tokenizer": {"name": self._tokenizer_name, "vocab_size": self.encoding.tokenizer.vocab_size},
            "source_length": self._lengths[0],
            "target_length": self._lengths[1],
            "members": {name: member.describe() for name, member in self.members.items()},
        }
