"""results.json and the other files of a run folder; the schema is in docs/results.md."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_lab.errors import UserError
from subspace_lab.rundir import HASH_FILE, RESULTS_FILE

SCHEMA_VERSION = 1
CURVES_FILE = "metrics.csv"

Results = dict[str, Any]


def start(
    run_dir: Path, config: Mapping[str, Any], config_hash: str, environment: Mapping[str, Any], command: str
) -> None:
    """Write config.yaml, config_hash, command.txt and environment.json; earlier command lines stay above the new one.

    Args:
        run_dir: the run folder, made if needed.
        config: the resolved configuration as plain containers.
        config_hash: see `schema.config_hash`.
        environment: see `reporting.environment.capture`.
        command: the exact command line.
    """
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    write_text(run_dir / HASH_FILE, config_hash + "\n")
    write_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
    commands = run_dir / "command.txt"
    before = commands.read_text() if commands.is_file() else ""
    write_text(commands, f"{before}{command}\n")


def write(run_dir: Path, results: Results) -> None:
    """Write results.json as a whole or not at all; figures that JSON has no numbers for (NaN, inf) become null."""
    text = json.dumps(_finite({"schema_version": SCHEMA_VERSION, **results}), indent=2, allow_nan=False)
    write_text(run_dir / RESULTS_FILE, text + "\n")


def read(path: Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: the file is not one of ours, or of a newer version.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable results.json: {error}") from None
    if not isinstance(results, dict) or "status" not in results or "metrics" not in results:
        raise UserError(f"{path}: not a results.json of subspace-lab")
    if int(results.get("schema_version", 0)) > SCHEMA_VERSION:
        raise UserError(f"{path}: written by a newer subspace-lab (schema {results['schema_version']})")
    return results


def find(paths: Iterable[Path]) -> list[tuple[Path, Results]]:
    """Return (run folder, results) of every results.json at or below the paths, in order of folder names.

    Raises:
        UserError: a path does not exist.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found = [path] if path.is_file() else sorted(path.rglob(RESULTS_FILE))
        files.update(dict.fromkeys(found))
    runs = []
    for file in files:
        try:
            runs.append((file.parent, read(file)))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return runs


def write_csv(target: Path, runs: Sequence[tuple[Path, Results]]) -> None:
    """Write one line per run: folder, how it ended, seed, the options chosen, what was typed, and every figure.

    Args:
        target: the file; its folder is made.
        runs: (run folder, results).
    """
    import csv

    rows = []
    for folder, found in runs:
        row = {"folder": str(folder), "status": found["status"], "seed": found.get("seed")}
        row |= {group: found.get("choices", {}).get(group) for group in ("method", "optimizer", "model", "data")}
        typed = (text.lstrip("+").partition("=") for text in found.get("overrides") or ())
        row |= {key: value for key, _, value in typed if key not in row}
        rows.append(row | {"steps": found.get("timing", {}).get("steps"), **found["metrics"]})
    names = list(dict.fromkeys(name for row in rows for name in row))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it can be typed again."""
    import shlex

    program = Path(argv[0]).name if argv else ""
    if program == "__main__.py":
        program = "python -m subspace_lab"
    return " ".join([program, *(shlex.quote(word) for word in argv[1:])])


def write_text(target: Path, text: str) -> None:
    """Write a text file so that `target` always is either the old text or the new."""
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
