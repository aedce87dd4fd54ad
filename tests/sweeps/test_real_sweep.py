"""A real sweep in this process: a cell that fails, a Ctrl-C in the middle, and the same command until all is done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subspace_lab import interrupt

WORDS = ["-m", "method=gcr", "model=mlp", "method.k=4,1000", "seed=0,1", "trainer.max_steps=12", "trainer.val_every=6"]
WORDS += ["trainer.log_every=1", "trainer.checkpoint_every=4", "trainer.progress=off", "scheduler=constant"]
WORDS += ["optimizer.lr=0.02", "export=false", "hydra.sweep.dir=sweep", "resume=auto"]


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@contextlib.contextmanager
def ctrl_c_at_step(file: Path, step: int) -> Iterator[None]:
    """Interrupt this process once a run has written the row of a step."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                if any(line.startswith(f"{step},") for line in file.read_text().splitlines()):
                    os.kill(os.getpid(), signal.SIGINT)
                    return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@pytest.mark.slow
def test_the_same_command_until_all_is_done(command, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    with ctrl_c_at_step(sweep / "1" / "metrics.csv", 2):
        answer = command(*WORDS)
    assert answer.code == 130, answer.err
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith(
        "stopped: sweep interrupted, 1 of 4 cells are finished and what ran is saved; continue with: "
    )
    assert results_of(sweep / "0")["status"] == "completed"
    assert results_of(sweep / "1")["status"] == "interrupted" and not (sweep / "2").exists()
    first = (sweep / "0" / "results.json").stat().st_mtime_ns
    interrupt.request.signal = None  # as in a new process

    answer = command(*WORDS)
    assert answer.code == 1, answer.err
    assert "1 of 4 cells are finished already" in answer.err
    assert (sweep / "0" / "results.json").stat().st_mtime_ns == first
    one = results_of(sweep / "1")
    assert one["status"] == "completed" and one["timing"]["steps"] == 12
    rows = (sweep / "1" / "metrics.csv").read_text().splitlines()
    assert len((sweep / "1" / "command.txt").read_text().splitlines()) == 2, "it went on in its folder"
    assert rows[1].startswith("1,") and sum(row.startswith("1,") for row in rows) == 1, "and not from the start"
    failed = answer.err.split("2 of 4 cells failed:\n")[1].splitlines()
    assert failed[0].startswith("  method.k=1000 seed=0: ") and "1000" in failed[0].split(": ")[1]
    assert failed[0].endswith("(sweep/2/run.log)") and failed[1].startswith("  method.k=1000 seed=1: ")
    assert "best val/accuracy" not in answer.out and "subspace/k" not in answer.err
    assert (sweep / "2" / "run.log").is_file() and "Traceback" not in answer.err
    done = {n: (sweep / n / "results.json").stat().st_mtime_ns for n in "01"}

    answer = command(*WORDS)
    assert answer.code == 1 and "2 of 4 cells are finished already" in answer.err
    assert {n: (sweep / n / "results.json").stat().st_mtime_ns for n in "01"} == done
    assert "2 of 4 cells failed" in answer.err
    answer = command("report", "sweep")
    assert answer.code == 0 and "2 of 4 cells failed" in answer.out
