"""Two processes over gloo, started by the command line as a user would, learn what one process learns."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow  # through Lightning's own launcher; tests/distributed compares without it
def test_two_processes_learn_what_one_does(tiny: Any) -> None:
    shared = ("scheduler=constant", "trainer.max_steps=8", "trainer.val_every=4")
    tiny.fit("one", *shared)
    two = tiny.root / "two"
    words = [*tiny.words(), *shared, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    words += ["data.batch_size=2", "compare=null", "trainer.progress=lines", f"hydra.run.dir={two}"]
    done = subprocess.run(
        [sys.executable, "-m", "subspace_lab", *words],
        cwd=tiny.root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(two)) == 1 and done.stderr.count("step 8/8") == 1  # only the first process speaks
    assert json.loads((two / "results.json").read_text())["status"] == "completed"
    alone, together = rows(tiny.root / "one"), rows(two)
    assert [row["step"] for row in together] == [row["step"] for row in alone] == [str(s) for s in range(1, 9)]
    for name in ("train/loss", "val/loss", "val/bits_per_byte", "train/tokens", "train/lr"):
        left, right = ([float(row[name]) for row in part if row[name]] for part in (alone, together))
        assert left == pytest.approx(right, rel=1e-4), name
