"""Jobs that go on when submitit's launcher has met one that died, and raised: they are waited for here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

_FOLDER = ".submitit"  # below the sweep's, one folder per job, as Hydra's launcher has it
_POLL = 5.0  # seconds


def outlived(sweep_dir: Path, since: float) -> bool:
    """Wait until every job that submitit has started is over; return whether there was any.

    Args:
        sweep_dir: the sweep's folder.
        since: when it started them, in seconds since the epoch.
    """
    folders = [path for path in (sweep_dir / _FOLDER).glob("*") if path.is_dir() and path.stat().st_mtime >= since - 1]
    jobs = sorted({path.name.split("_")[0] for path in folders if path.name.split("_")[0].isdigit()})
    for job in jobs:
        while _alive(job):
            time.sleep(_POLL)
    return bool(jobs)


def _alive(job: str) -> bool:
    with contextlib.suppress(ChildProcessError):  # submitit's local jobs are our children, named by process id
        os.waitid(os.P_PID, int(job), os.WEXITED | os.WNOWAIT)
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, timeout=60)
        return told.returncode == 0 and bool(told.stdout.strip())
    return False
