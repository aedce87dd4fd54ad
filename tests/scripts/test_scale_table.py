"""docs/scale.md holds what the closed form says now; its other figures come from real processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "scale_table.py"))
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = text.split(script["START"], 1)[1].split(script["END"], 1)[0].strip()
    assert table == script["table"](), "python scripts/scale_table.py writes it"


@pytest.mark.slow
def test_two_processes_send_what_the_formula_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "measure_communication.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "galore, fsdp" in done.stdout
