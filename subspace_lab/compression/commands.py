"""`subspace-lab rebuild` and `subspace-lab compress`: words in, tables and files out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from typing_extensions import override

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from subspace_lab.compression.compress import Row

REBUILD_USAGE = "subspace-lab rebuild FILE [--output DIR] [--device cpu|cuda] [--theta0 FILE]"
COMPRESS_USAGE = (
    "subspace-lab compress RUN_DIR [--levels 5,9,17 | --bits 3,4,5] [--finetune EPOCHS] [--choices N] [--delta 0.05] "
    "[--device cpu|cuda]"
)


def rebuild(words: Sequence[str]) -> int:
    """Make the whole model of a solution again, write it, and say what was checked.

    Raises:
        UserError: wrong words, a file that is none of ours, θ that cannot be reproduced here.
    """
    parser = _Parser(REBUILD_USAGE)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--theta0", type=Path)
    options = parser.parse_args(words)
    device = _device(options.device)

    from subspace_lab.compression import rebuild as rebuilding
    from subspace_lab.protocols.fit import export

    solution, size = rebuilding.load(options.file)
    model, method = rebuilding.restore(solution, device, options.theta0)
    start = options.file if options.file.is_dir() else options.file.parent
    folder: Path = options.output or start / "rebuilt"
    if folder.is_file():
        raise UserError(f"--output {folder}: a file, expected a folder")
    try:
        export(model, method, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    print(f"D = {solution.D:,} weights from d = {solution.d:,} numbers, {size:,} bytes ({4 * solution.D / size:,.0f}×)")
    print(f"verified: θ has SHA-256 {solution.theta_sha256}")
    print(folder)
    return 0


def compress(words: Sequence[str]) -> int:
    """Code a finished run in few bytes, print what each coding costs, and write and verify the best.

    Raises:
        UserError: wrong words, not a finished run of a classifier in a subspace.
    """
    parser = _Parser(COMPRESS_USAGE)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--levels", type=_whole_numbers)
    how.add_argument("--bits", type=_whole_numbers)
    parser.add_argument("--finetune", type=int, default=0)
    parser.add_argument("--choices", type=int, default=1)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(words)
    levels = _levels(options.levels, options.bits)
    if not 0 < options.delta < 1:
        raise UserError(f"--delta {options.delta}: expected a probability between 0 and 1")
    if options.finetune < 0 or options.choices < 1:
        raise UserError("--finetune takes 0 epochs or more, --choices 1 or more")
    device = _device(options.device)

    from rich.console import Console

    from subspace_lab.compression import compress as compressing
    from subspace_lab.compression import sid

    bench = compressing.open_run(options.run_dir, device)
    with Console(stderr=True).status("measuring each coding on all training and test examples") as status:

        def tell(row: Row) -> None:
            status.update(
                f"measuring; last: {row.coding} {row.levels or ''} {row.payload_bytes} B, bound {row.bound:.4f}"
            )

        rows, best = compressing.compress(
            bench, levels, delta=options.delta, epochs=options.finetune, choices=options.choices, tell=tell
        )
    file = options.run_dir / sid.FILE
    best.save(file)
    again = compressing.verify(file, bench)
    chosen = min((row for row in rows if row.file_bytes), key=lambda row: row.bound)
    if again.accuracy != chosen.test_accuracy:
        raise UserError(f"{file} rebuilds to a test accuracy of {again.accuracy}, not {chosen.test_accuracy}")
    n = bench.data.train_rows
    about = {"delta": options.delta, "train_examples": n, "choices": options.choices, "d": bench.solution.d}
    compressing.write_rows(options.run_dir / compressing.FILE, rows, D=bench.solution.D, **about)
    Console().print(table(rows, chosen))
    print(
        f"with probability {1 - options.delta:g} over the {n:,} training examples, the error on new ones is at most "
        f"{chosen.bound:.4f}"
    )
    print(f"verified: {file} ({len(best.data):,} bytes) rebuilds to the same test accuracy")
    return 0


def table(rows: Sequence[Row], chosen: Row) -> Table:
    """Return the rows as a rich table, the chosen one in bold."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("coding of z")
    for name in ("levels", "payload B", "file B", "test acc", "train error", "bound"):
        made.add_column(name, justify="right")
    for row in rows:
        certified = bool(row.file_bytes)
        made.add_row(
            row.coding,
            str(row.levels) if certified else "",
            f"{row.payload_bytes:,}",
            f"{row.file_bytes:,}" if certified else "",
            f"{row.test_accuracy:.4f}",
            f"{row.train_error:.4f}",
            f"{row.bound:.4f}" if certified else "",
            style="bold" if row is chosen else None,
        )
    return made


class _Parser(argparse.ArgumentParser):
    def __init__(self, usage: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._line = usage

    @override
    def error(self, message: str) -> NoReturn:
        raise UserError(message, hint=self._line)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected whole numbers with commas between them") from None


def _levels(levels: list[int] | None, bits: list[int] | None) -> list[int]:
    from subspace_lab.compression.compress import LEVELS
    from subspace_lab.compression.quantize import MAX_LEVELS

    if bits is not None:
        if not bits or min(bits) < 1 or max(bits) > MAX_LEVELS.bit_length() - 1:
            raise UserError(f"--bits: expected 1 … {MAX_LEVELS.bit_length() - 1}, got {bits}")
        return [2**b for b in bits]
    if levels is None:
        return list(LEVELS)
    if not levels or min(levels) < 2 or max(levels) > MAX_LEVELS:
        raise UserError(f"--levels: expected 2 … {MAX_LEVELS}, got {levels}")
    return levels


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}", hint="cpu, cuda or cuda:1") from None
    return name
