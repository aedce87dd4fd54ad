"""Write text tasks in the layout that data=text_5_tasks and text_15_tasks read, from the original files of the sets.

python scripts/prepare_text_tasks.py --data ~/data                          every task that ~/data has files of
python scripts/prepare_text_tasks.py --data ~/data --tasks agnews sst-2     these; what is missing is an error
python scripts/prepare_text_tasks.py --data ~/data --out ~/data/text_tasks --size 2000

Originals, below --data: glue/{SST-2,RTE,MRPC,QQP,MNLI,CoLA}/{train,dev}.tsv; ag_news, imdb, sentence_tasks
(trec, subj, mr, cr, mpqa), amazon_multidomain (books, dvd, electronics, kitchen) as jsonl with text and label; all
also as .gz.
Each task becomes <out>/<task>/{train,test}.jsonl with sentence and label; one without a test part gives its last fifth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subspace_lab.data.splits import fixed_order
from subspace_lab.data.text_files import read_rows
from subspace_lab.errors import UserError, did_you_mean

Row = dict[str, str]


@dataclass(frozen=True)
class Original:
    """Where a set's files are and how a row reads.

    Attributes:
        train: file below the data folder, without .gz.
        test: likewise; None: the last fifth of `train`, in a fixed random order.
        columns: one or two text columns, then the label; numbers where a tsv has no header.
        labels: the task's words for the labels.
        names: what the two texts are called.
    """

    train: str
    test: str | None
    columns: tuple[str, ...]
    labels: dict[str, str]
    names: tuple[str, str] = ("sentence 1", "sentence 2")


_BAD_GOOD = {"0": "Bad", "1": "Good"}
_FALSE_TRUE = {"0": "False", "1": "True"}
_TEXT = ("text", "label")
_FIRST_SECOND = ("first sentence", "second sentence")
_TREC = dict(enumerate(("Description", "Entity", "Abbreviation", "Human", "Location", "Number")))

ORIGINALS: dict[str, Original] = {
    "agnews": Original(
        "ag_news/train.jsonl",
        "ag_news/test.jsonl",
        _TEXT,
        {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Science or Technology"},
    ),
    "imdb": Original("imdb/train.jsonl", "imdb/test.jsonl", _TEXT, _BAD_GOOD | {"neg": "Bad", "pos": "Good"}),
    "sst-2": Original("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", ("sentence", "label"), _BAD_GOOD),
    "rte": Original(
        "glue/RTE/train.tsv",
        "glue/RTE/dev.tsv",
        ("sentence1", "sentence2", "label"),
        {"entailment": "entailment", "not_entailment": "contradiction"},
    ),
    "mnli": Original(
        "glue/MNLI/train.tsv",
        "glue/MNLI/dev_matched.tsv",
        ("sentence1", "sentence2", "gold_label"),
        {word: word for word in ("entailment", "neutral", "contradiction")},
    ),
    "qqp": Original(
        "glue/QQP/train.tsv",
        "glue/QQP/dev.tsv",
        ("question1", "question2", "is_duplicate"),
        _FALSE_TRUE,
        _FIRST_SECOND,
    ),
    "mrpc": Original(
        "glue/MRPC/train.tsv",
        "glue/MRPC/dev.tsv",
        ("#1 String", "#2 String", "Quality"),
        _FALSE_TRUE,
        _FIRST_SECOND,
    ),
    "cola": Original("glue/CoLA/train.tsv", "glue/CoLA/dev.tsv", ("3", "1"), _FALSE_TRUE),
    "trec": Original(
        "sentence_tasks/trec.train.jsonl",
        "sentence_tasks/trec.test.jsonl",
        _TEXT,
        {str(number): word for number, word in _TREC.items()},
    ),
    "subj": Original("sentence_tasks/subj.all.jsonl", None, _TEXT, {"0": "Opinion", "1": "Fact"}),
    **{name: Original(f"sentence_tasks/{name}.all.jsonl", None, _TEXT, _BAD_GOOD) for name in ("mr", "cr", "mpqa")},
    **{
        name: Original(
            f"amazon_multidomain/{name}.train.jsonl", f"amazon_multidomain/{name}.dev.jsonl", _TEXT, _BAD_GOOD
        )
        for name in ("books", "dvd", "electronics", "kitchen")
    },
}


def find(data: Path, name: str | None) -> Path | None:
    """Return a file or its .gz, if it is there."""
    paths = (data / f"{name}{suffix}" for suffix in ("", ".gz"))
    return next((path for path in paths if name and path.is_file()), None)


def missing(data: Path, original: Original) -> list[str]:
    """Return what of a set is not there."""
    return [name for name in (original.train, original.test) if name is not None and find(data, name) is None]


def read(path: Path, original: Original) -> list[Row]:
    """Return `sentence` and `label` of every row of one file that has a label.

    Raises:
        UserError: a column is absent, or a label unknown.
    """
    if ".tsv" in path.suffixes:
        lines = [line.rstrip("\r").split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
        bare = original.columns[0].isdigit()
        header = [str(number) for number in range(len(lines[0]))] if bare else lines[0]
        rows = [dict(zip(header, line, strict=True)) for line in lines[not bare :] if len(line) == len(header)]
    else:
        rows = read_rows(path)
    absent = [column for column in original.columns if not rows or column not in rows[0]]
    if absent:
        raise UserError(f"{path}: no column '{absent[0]}'", hint=f"it has: {', '.join(rows[0]) if rows else 'no rows'}")
    made = []
    for row in rows:
        *texts, label = (str(row[column]) for column in original.columns)
        if label == "-":
            continue
        if label not in original.labels:
            raise UserError(f"{path}: label '{label}'", hint=f"expected one of {', '.join(original.labels)}")
        named = [f"{name}: {text}" for name, text in zip(original.names, texts, strict=False)]
        made.append({"sentence": texts[0] if len(texts) == 1 else "\n".join(named), "label": original.labels[label]})
    return made


def prepare(name: str, data: Path, out: Path, size: int | None) -> tuple[int, int]:
    """Write one task and return how many examples its parts have."""
    original = ORIGINALS[name]
    train_path, test_path = find(data, original.train), find(data, original.test)
    assert train_path is not None
    train = read(train_path, original)
    if test_path is not None:
        test = read(test_path, original)
    else:
        order = fixed_order(len(train), f"{name}/test")
        cut = len(train) - len(train) // 5
        train, test = ([train[row] for row in np.sort(rows)] for rows in (order[:cut], order[cut:]))
    parts = []
    for part, rows in (("train", train), ("test", test)):
        if size is not None and len(rows) > size:
            rows = [rows[row] for row in np.sort(fixed_order(len(rows), f"{name}/{part}/size")[:size])]
        write(out / name / f"{part}.jsonl", rows)
        parts.append(len(rows))
    return parts[0], parts[1]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare tasks; exit code 2 if one that was asked for is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the original files")
    parser.add_argument("--out", type=Path, help="folder of the tasks; <data>/text_tasks if not given")
    parser.add_argument("--tasks", nargs="+", help="which; all that are there if not given")
    parser.add_argument("--size", type=int, help="at most so many examples of each part, drawn at random")
    options = parser.parse_args(arguments)
    out = options.out or options.data / "text_tasks"
    try:
        names = [name.casefold() for name in options.tasks or ORIGINALS]
        for name in names:
            if name not in ORIGINALS:
                hint = did_you_mean(name, ORIGINALS) or f"these are: {', '.join(ORIGINALS)}"
                raise UserError(f"--tasks {name}: not made from original files", hint=hint)
            absent = missing(options.data, ORIGINALS[name])
            if absent and options.tasks:
                raise UserError(f"{name}: {' and '.join(absent)} not found in {options.data}", hint="also as .gz")
            if not absent:
                train, test = prepare(name, options.data, out, options.size)
                print(f"{name:12} train {train:6}  test {test:6}  {out / name}")
            else:
                print(f"{name:12} not there: {', '.join(absent)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
