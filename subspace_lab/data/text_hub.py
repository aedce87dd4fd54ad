"""Rows of the T5 benchmark's tasks from the Hugging Face hub, where no files are and there is a network.

The benchmark drew its rows at random from these sets and published the draw; from the hub it is another draw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.splits import fixed_order
from subspace_lab.data.text_catalog import TextTask
from subspace_lab.data.text_files import Pairs, make_pairs

Row = Mapping[str, Any]
_MOST = 100_000  # rows looked at, at random: more than any task is trained on


@dataclass(frozen=True)
class HubSet:
    """Where a task is on the hub.

    Attributes:
        path: of the data set.
        config: its configuration.
        test: the part to report on; the labels of GLUE's and SuperGLUE's test parts are not public.
        sentence: a row as text.
        labels: words of the labels, by number; none: the task's.
        label: the column with the number.
    """

    path: str
    config: str | None
    test: str
    sentence: Callable[[Row], str]
    labels: Sequence[str] = ()
    label: str = "label"


def _titled(title: str, text: str) -> Callable[[Row], str]:
    return lambda row: f"Title: {row[title]}\nText: {row[text]}"


def _pair(one: str, two: str, first: str = "sentence 1", second: str = "sentence 2") -> Callable[[Row], str]:
    return lambda row: f"{first}: {row[one]}\n{second}: {row[two]}"


def _copa(row: Row) -> str:
    return f'Which sentence is the {row["question"]} of "{row["premise"]}"?\nA: {row["choice1"]}\nB: {row["choice2"]}'


def _multirc(row: Row) -> str:
    return f"paragraph: {row['paragraph']}\nquestion: {row['question']}\nanswer: {row['answer']}"


def _boolq(row: Row) -> str:
    return f"question: {row['question']}\npassage: {row['passage']}"


def _wic(row: Row) -> str:
    return f"word: {row['word']}\n{row['sentence1']}\n{row['sentence2']}"


_GLUE, _SUPER, _FALSE_TRUE = "nyu-mll/glue", "aps/super_glue", ("False", "True")
_NLI = ("entailment", "neutral", "contradiction")

SETS: dict[str, HubSet] = {
    "agnews": HubSet("fancyzhx/ag_news", None, "test", lambda row: f"Text: {row['text']}"),
    "dbpedia": HubSet("fancyzhx/dbpedia_14", None, "test", _titled("title", "content")),
    "yahoo": HubSet(
        "community-datasets/yahoo_answers_topics", None, "test", _titled("question_title", "question_content"),
        label="topic",
    ),
    "yelp": HubSet("Yelp/yelp_review_full", None, "test", lambda row: f"Text: {row['text']}"),
    "imdb": HubSet("stanfordnlp/imdb", None, "test", lambda row: str(row["text"]), ("Bad", "Good")),
    "sst-2": HubSet(_GLUE, "sst2", "validation", lambda row: f"Text: {row['sentence']}", ("Bad", "Good")),
    "mnli": HubSet(_GLUE, "mnli", "validation_matched", _pair("premise", "hypothesis"), _NLI),
    "qqp": HubSet(
        _GLUE, "qqp", "validation", _pair("question1", "question2", "first sentence", "second sentence"), _FALSE_TRUE
    ),
    "rte": HubSet(_GLUE, "rte", "validation", _pair("sentence1", "sentence2"), ("entailment", "contradiction")),
    "cb": HubSet(_SUPER, "cb", "validation", _pair("premise", "hypothesis")),
    "copa": HubSet(_SUPER, "copa", "validation", _copa),
    "boolqa": HubSet(_SUPER, "boolq", "validation", _boolq, _FALSE_TRUE),
    "wic": HubSet(_SUPER, "wic", "validation", _wic, _FALSE_TRUE),
    "multirc": HubSet(_SUPER, "multirc", "validation", _multirc, _FALSE_TRUE),
}  # fmt: skip


def load_hub(task: TextTask, tried: str) -> tuple[Pairs, Pairs]:
    """Return the training and the test part of a task from the hub.

    Args:
        task: which.
        tried: where it was looked for before, for the message.

    Raises:
        UserError: the hub has not got it, or there is no network.
    """
    hint = (
        "SUBSPACE_DATA=/some/folder or data.root=/some/folder says where the tasks lie; "
        "scripts/prepare_text_tasks.py writes them from original files"
    )
    try:
        if task.name not in SETS:
            raise LookupError("it is not on the hub in this form")
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise ConnectionError("HF_HUB_OFFLINE is set")
        require_network()
        from datasets import load_dataset

        found = SETS[task.name]
        parts = [load_dataset(found.path, found.config, split=split) for split in ("train", found.test)]
    except Exception as error:
        raise hub_error(tried, f"task {task.name} from the Hugging Face hub", error, hint) from error
    train, test = (hub_pairs(task, part) for part in parts)
    return train, test


def hub_pairs(task: TextTask, part: Any) -> Pairs:
    """Return prompts and answers of a part as the hub gives it (something with `len` and `select`)."""
    found = SETS[task.name]
    if len(part) > _MOST:
        part = part.select(np.sort(fixed_order(len(part), f"{found.path}/rows")[:_MOST]))
    words = found.labels or task.labels
    rows = [
        {"sentence": found.sentence(row), "label": words[row[found.label]] if row[found.label] >= 0 else "-"}
        for row in part
    ]
    return make_pairs(task, rows, found.path)
