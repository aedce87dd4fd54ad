"""Rows of a text task from files: the plain layout, the T5 benchmark's own files, TRACE's; jsonl, json or csv.

    <root>/<task>/train.jsonl, test.jsonl          also .json (a list of objects) and .csv, each also .gz
    <root>/<group>/<task>/train.json, test.json    as the T5 benchmark is published

A row has `source` and `target` or `prompt` and `answer`, used as they are, or `sentence` (or `text`) and `label`, to
which the task's question is put. Where there is no test file, dev, eval or validation is it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace_lab.data.text_catalog import TextTask
from subspace_lab.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

_WHOLE = (("source", "target"), ("prompt", "answer"))
_ASKED = (("sentence", "label"), ("text", "label"))
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
_TEST = ("test", "dev", "eval", "validation")
_UNLABELLED = ("", "-")  # how MNLI writes that annotators did not agree


@dataclass(frozen=True)
class Pairs:
    """One part of a task.

    Attributes:
        sources: what the model reads, a prompt per example.
        targets: what it should answer.
    """

    sources: list[str]
    targets: list[str]


def folders(roots: Sequence[Path]) -> dict[str, Path]:
    """Return the folders of tasks below the roots by their names in small letters; the first root goes first."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder in sorted([*root.glob("*/"), *root.glob("*/*/")]) if root.is_dir() else ():
            if part_file(folder, ("train",)):
                found.setdefault(folder.name.casefold(), folder)
    return found


def part_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first file of these names, with any of the suffixes."""
    paths = (folder / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def load_folder(task: TextTask, folder: Path) -> tuple[Pairs, Pairs]:
    """Return the training and the test part of a task.

    Raises:
        UserError: a file is absent or unreadable, lacks a column or has a label that the task has not.
    """
    parts = []
    for names in (("train",), _TEST):
        path = part_file(folder, names)
        if path is None:
            raise UserError(
                f"data: {folder} has no {names[0]} part", hint=f"expected {names[0]}.jsonl, .json or .csv there"
            )
        parts.append(make_pairs(task, read_rows(path), str(path)))
    return parts[0], parts[1]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a jsonl, json or csv file as dictionaries.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        if ".csv" in path.suffixes:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        # Split at \n only: other line ends are part of the texts.
        rows = json.loads(text) if ".json" in path.suffixes else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:160]})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects with 'sentence' and 'label' or 'source' and 'target'")
    return rows


def make_pairs(task: TextTask, rows: list[dict[str, Any]], where: str) -> Pairs:
    """Return prompts and answers of rows; those that nobody labelled are left out, with a warning.

    Raises:
        UserError: no rows, a column is absent, or a label is not one of the task's.
    """
    if not rows:
        raise UserError(f"{where}: no rows")
    columns = next((pair for pair in (*_WHOLE, *_ASKED) if all(name in rows[0] for name in pair)), None)
    if columns is None:
        raise UserError(
            f"{where}: no columns 'sentence' and 'label' or 'source' and 'target'",
            hint=f"its first row has: {', '.join(map(str, rows[0])) or 'nothing'}",
        )
    source, target = columns
    known = {label.casefold(): label for label in task.labels}
    pairs = Pairs([], [])
    for number, row in enumerate(rows, start=1):
        if row.get(source) is None or row.get(target) is None:
            raise UserError(f"{where}: row {number} has no '{source if row.get(source) is None else target}'")
        text, answer = str(row[source]), str(row[target])
        if columns in _ASKED:
            text = task.prompt(text)
        if known:
            if answer.strip() in _UNLABELLED:
                continue
            if answer.strip().casefold() not in known:
                options = did_you_mean(answer, task.labels) or f"one of {', '.join(task.labels)}"
                raise UserError(f"{where}: row {number} has label '{answer}', which {task.name} has not", hint=options)
            answer = known[answer.strip().casefold()]
        pairs.sources.append(text)
        pairs.targets.append(answer)
    if len(pairs.sources) < len(rows):
        log.warning(
            "%s: %d of %d rows have no label and are left out.", where, len(rows) - len(pairs.sources), len(rows)
        )
    if not pairs.sources:
        raise UserError(f"{where}: no row has a label")
    return pairs
