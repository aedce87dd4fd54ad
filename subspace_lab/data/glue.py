"""Sentence classification from GLUE: the files of its archive, or the hub's copy where they are absent."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.errors import UserError

log = logging.getLogger(__name__)

Dataset = Literal["mrpc", "qqp", "sst2", "rte"]
HUB = "nyu-mll/glue"
CLASSES = 2


@dataclass(frozen=True)
class Layout:
    """Where one GLUE set's files and columns are.

    Attributes:
        folder: of the archive, below <data_dir>/glue.
        columns: of train.tsv and dev.tsv: one or two sentences, then the label.
        hub_columns: the sentences' names on the hub, where the label is called label.
        labels: their words where they are not numbers, in the hub's order.
    """

    folder: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")


LAYOUTS: dict[str, Layout] = {
    "mrpc": Layout("MRPC", ("#1 String", "#2 String", "Quality"), ("sentence1", "sentence2")),
    "qqp": Layout("QQP", ("question1", "question2", "is_duplicate"), ("question1", "question2")),
    "sst2": Layout("SST-2", ("sentence", "label"), ("sentence",)),
    "rte": Layout(
        "RTE", ("sentence1", "sentence2", "label"), ("sentence1", "sentence2"), ("entailment", "not_entailment")
    ),
}


@dataclass(frozen=True)
class Sentences:
    """One part of a set.

    Attributes:
        texts: one tuple of all examples' sentences for each sentence column.
        labels: int64 (n,).
        identity: hash of both.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: npt.NDArray[np.int64]
    identity: str


@lru_cache(maxsize=4)
def load(dataset: str, data_dir: Path) -> tuple[Sentences, Sentences]:
    """Return the training set and GLUE's development set (its test labels are not public); shared within a process.

    Raises:
        UserError: no files and no network, or files without the columns they should have.
    """
    layout = LAYOUTS[dataset]
    folder = data_dir / "glue" / layout.folder
    if (folder / "train.tsv").is_file() and (folder / "dev.tsv").is_file():
        return _read(folder / "train.tsv", layout), _read(folder / "dev.tsv", layout)
    return _from_hub(dataset, layout, folder)


def _read(path: Path, layout: Layout) -> Sentences:
    """Read a GLUE tsv: no quoting, whatever quotation marks the sentences hold."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    header = rows[0] if rows else []
    absent = [name for name in layout.columns if name not in header]
    if absent:
        raise UserError(
            f"{path}: no column '{absent[0]}'", hint=f"its first line has: {', '.join(header) or 'nothing'}"
        )
    places = [header.index(name) for name in layout.columns]
    # GLUE's own files have some lines with too few columns (QQP) and none with an unknown label.
    kept = [row for row in rows[1:] if len(row) == len(header) and row[places[-1]] in layout.labels]
    if len(kept) < len(rows) - 1:
        log.warning("%s: %d of %d lines are incomplete and left out.", path, len(rows) - 1 - len(kept), len(rows) - 1)
    if not kept:
        raise UserError(f"{path}: no complete line below the header")
    texts = tuple(tuple(row[place] for row in kept) for place in places[:-1])
    return _sentences(texts, [layout.labels.index(row[places[-1]]) for row in kept])


def _from_hub(dataset: str, layout: Layout, folder: Path) -> tuple[Sentences, Sentences]:
    source = f"{HUB} ({dataset}) from the Hugging Face hub"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise ConnectionError("HF_HUB_OFFLINE is set")
        require_network()
        from datasets import load_dataset

        parts = [load_dataset(HUB, dataset, split=split) for split in ("train", "validation")]
    except Exception as error:
        raise hub_error(
            f"data={dataset}: no train.tsv and dev.tsv in {folder}",
            source,
            error,
            "SUBSPACE_DATA=/some/folder or data.data_dir=/some/folder says where glue/ lies",
        ) from error
    train, dev = (
        _sentences(tuple(tuple(part[name]) for name in layout.hub_columns), list(part["label"])) for part in parts
    )
    return train, dev


def _sentences(texts: tuple[tuple[str, ...], ...], labels: list[int]) -> Sentences:
    digest = hashlib.blake2b(digest_size=16)
    for row in zip(*texts, map(str, labels), strict=True):
        digest.update("\t".join(row).encode() + b"\n")
    return Sentences(texts, np.asarray(labels, dtype=np.int64), digest.hexdigest())
