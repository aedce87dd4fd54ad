"""Checkpoints in, a checkpoint out: checked first, streamed, with a card that says what was merged and how."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Merge
from subspace_lab.merging.card import describe_method, hash_files, versions, write_card
from subspace_lab.merging.checking import check_number, check_tensors, refuse
from subspace_lab.merging.checkpoints import Checkpoint, Checkpoints
from subspace_lab.merging.engine import run
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.merging.writing import CheckpointWriter, ScratchFile, check_output

_SILENCE = 30.0  # seconds between lines where there is no bar


def merge_files(
    method: Merge,
    settings: MergeSettings,
    output: Path,
    tell: Callable[[str], None],
    *,
    scale_chosen: str = "given",
) -> dict[str, Any]:
    """Merge `settings.models` into a checkpoint that loads like the base.

    Args:
        method: the rule.
        settings: the group `merge`; its `output` is not looked at.
        output: folder of the merged checkpoint; must not hold anything but an earlier merge.
        tell: shows a line of progress.
        scale_chosen: how λ was found, for the card.

    Returns:
        What merge.json holds (method, sources with hashes, tensors by kind …), the method's `metrics`, `notes`,
        `output`, `bytes_read`, `bytes_written`, `seconds` of the merge and `hash_seconds` beside it.

    Raises:
        UserError: a method that needs examples; checkpoints that are missing, damaged or do not fit together (all that
            is wrong, one a line); values that are not finite.
    """
    models = settings.models or {}
    if method.needs_data:
        raise UserError(
            f"{type(method).__name__} learns from examples, and checkpoints alone have none",
            hint="give data=… and merge.models={task: checkpoint, …}",
        )
    refuse(list(check_number(method, len(models), base=settings.base is not None)))
    device = settings.find_device()
    check_output(output)
    base, tuned = _open(settings)
    first = next(iter(tuned.values())) if base is None else base
    refuse(list(check_tensors(first.infos, {label: one.infos for label, one in tuned.items()}, settings.rules)))
    notes = _notes(base, tuned)
    for note in notes:
        tell(f"note: {note}")
    sources = Checkpoints(base, tuned, device)
    files = list(dict.fromkeys(file.resolve() for one in (first, *tuned.values()) for file in one.files))
    began = time.perf_counter()
    entries = sum(info.numel for info in first.infos.values())
    tell(f"merging {len(tuned)} models of {entries:,} values")
    with _hashing(files) as hashes, CheckpointWriter(output, first.infos, first.shards) as writer:
        scratch: list[ScratchFile] = []

        def shelf() -> ScratchFile:
            scratch.append(ScratchFile(writer.folder))
            return scratch[0]

        try:
            with _progress(entries, tell) as advance:
                kinds = run(method, sources, settings.rules, writer, shelf=shelf, advance=advance)
        finally:
            for file in scratch:
                file.close()
        seconds = time.perf_counter() - began
        if first.folder is not None:
            writer.copy_companions(first.folder)
        digests, hash_seconds = hashes()
        about = {
            "method": describe_method(method),
            "scale_chosen": scale_chosen,
            "family": settings.family,
            "base": None if base is None else _source(base, digests),
            "models": {label: _source(one, digests) for label, one in tuned.items()},
            "rules": {"vectors": settings.rules.vectors, "exclude": settings.rules.exclude}
            | {"split_fused_qkv": settings.rules.split_fused_qkv},
            "tensors": kinds,
            "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in first.infos.values()}),
            "metrics": method.metrics(),
            "notes": notes,
            "versions": versions(),
        }
        write_card(writer.folder, about)
        writer.finish()
    tell(f"merged in {seconds:.1f} s: {output}")
    return about | {
        "output": str(output),
        "bytes_read": sum(file.stat().st_size for file in files),
        "bytes_written": writer.bytes,
        "seconds": seconds,
        "hash_seconds": hash_seconds,
    }


def _open(settings: MergeSettings) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """The base and the models; what is wrong with any of them is told together."""
    found: dict[str, Checkpoint] = {}
    problems = []
    wanted = {"": settings.base} if settings.base is not None else {}
    for label, where in (wanted | (settings.models or {})).items():
        try:
            found[label] = Checkpoint(where, "merge.models" if label else "merge.base")
        except UserError as error:
            problems.append(str(error))
    refuse(problems)
    return found.pop("", None), found


def _notes(base: Checkpoint | None, models: dict[str, Checkpoint]) -> list[str]:
    """What is no error and yet likely a slip."""
    seen: dict[tuple[Path, ...], str] = {}
    notes = []
    for label, one in [*([("base", base)] if base is not None else []), *models.items()]:
        files = tuple(file.resolve() for file in one.files)
        if files in seen:
            who = "the base" if seen[files] == "base" else f"model {seen[files]}"
            notes.append(f"model {label} is {who} once more: {one.where}")
        seen.setdefault(files, label)
    return notes


def _source(checkpoint: Checkpoint, digests: dict[Path, str]) -> dict[str, Any]:
    return {
        "path": checkpoint.where,
        "hub": checkpoint.hub,
        "files": [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": digests[file.resolve()]}
            for file in checkpoint.files
        ],
    }


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], tuple[dict[Path, str], float]]]:
    """Hash files in a thread beside the merge; what is yielded waits for the digests and the seconds they took."""
    stop = threading.Event()
    began = time.perf_counter()

    def work() -> tuple[dict[Path, str], float]:
        return hash_files(files, stop), time.perf_counter() - began

    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(work).result
    finally:
        stop.set()
        pool.shutdown()


@contextmanager
def _progress(entries: int, tell: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every half minute elsewhere; what is yielded is told of entries that are done."""
    if not sys.stderr.isatty():
        done, last = 0, time.monotonic()

        def count(number: int) -> None:
            nonlocal done, last
            done += number
            if time.monotonic() - last > _SILENCE:
                last = time.monotonic()
                tell(f"{done / max(entries, 1):.0%} merged")

        yield count
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("merging"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), expand=True, transient=True) as bar:
        task = bar.add_task("", total=entries)
        yield lambda number: bar.advance(task, number)
