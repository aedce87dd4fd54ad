"""metrics.csv: one row per step, readable at every moment, and exact after a resume."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from subspace_lab.training.checkpoint import write_atomically


class RunCSVLogger(Logger):
    """Writes rows `step, name, …` to one CSV file.

    Values logged for the same step share a row, which is written when the next step's values arrive or on `save`. A
    name seen for the first time adds a column, and a value for a row already written is put into it: the file is then
    rewritten once. Values keep all their digits (repr).

    Args:
        path: the file; rows already there stay (a resumed run) and columns are taken over.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step"]
        self._row: dict[str, Any] = {}
        self._last_step: int | None = None
        if path.is_file():
            columns, rows = _read(path)
            self._columns = columns or self._columns
            self._remember(rows)

    @property
    def name(self) -> str:
        """Return the kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Return nothing: the run folder is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`."""
        if self._row and self._row["step"] != step:
            self.save()
        self._row.update(metrics, step=step)

    @rank_zero_only
    def save(self) -> None:
        """Write the pending row."""
        if not self._row:
            return
        row, self._row = self._row, {}
        new = [name for name in row if name not in self._columns]
        if new or row["step"] == self._last_step or not self.path.is_file():
            rows = _read(self.path)[1] if self.path.is_file() else []
            if rows and row["step"] == self._last_step:
                row = rows.pop() | row
            self._columns += new
            self._rewrite([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                file.write(_format([row], self._columns))
        self._last_step = int(row["step"])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the pending row."""
        self.save()

    def drop_rows_after(self, step: int) -> None:
        """Remove the rows of steps that a resumed run will do again, and a half-written last line."""
        self._row = {}
        if self.path.is_file():
            rows = [row for row in _read(self.path)[1] if int(row["step"]) <= step]
            self._rewrite(rows)
            self._remember(rows)

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        self._last_step = int(rows[-1]["step"]) if rows else None

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        header = ",".join(self._columns) + "\n"
        text = (header + _format(rows, self._columns)).encode()
        write_atomically(self.path, lambda file: file.write(text))


def _format(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return columns and whole rows; a line without its newline was cut off by a kill and is left out."""
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    return list(reader.fieldnames or []), [row for row in reader if row.get("step", "").isdigit()]
