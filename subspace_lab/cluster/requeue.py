"""After a run was told to stop and has saved: back into SLURM's queue, if it was preempted or its time is nearly over.

SIGUSR2 and SIGUSR1 say so (`#SBATCH --signal`). SIGTERM is a `scancel`, unless SLURM knows of a preemption: a site that
does not send the job's own signal then sends SIGTERM, and a job that ends by itself is not requeued by SLURM any more.
Under submitit nothing of this is needed: its own handler, which `interrupt.chain` calls, requeues.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from subspace_lab import rundir
from subspace_lab.cluster.settings import ClusterPlan

_TIMEOUT = 60
_FIELD = re.compile(r"\b(JobState|Requeue|PreemptTime|BatchFlag)=(\S+)")


def after_saving(signum: int | None, plan: ClusterPlan) -> bool:
    """Requeue this process's SLURM job if it is to go on later; say in one line what was done. For the first rank.

    Args:
        signum: the signal that ended the run.
        plan: says whether it may be requeued, and how often.

    Returns:
        Whether the job is in the queue again; SLURM is about to end this process then.
    """
    job = rundir.slurm_id()
    if job is None or signum not in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        return False
    shown = dict(_FIELD.findall(_scontrol("show", "job", job)[1]))
    if signum == signal.SIGTERM and shown.get("PreemptTime", "None") == "None":
        return False
    if shown.get("JobState", "RUNNING") != "RUNNING" or shown.get("BatchFlag") == "0":  # cancelled meanwhile; salloc
        return False
    reason = None
    if not plan.requeue:
        reason = "cluster.requeue=false"
    elif rundir.restarts() >= plan.max_requeues:
        reason = f"it was {plan.max_requeues} times, the most that cluster.max_requeues allows"
    elif shown.get("Requeue") == "0":
        reason = "it was submitted with --no-requeue"
    if reason is not None:
        _say(f"SLURM job {job} is not requeued: {reason}")
        return False
    _say(f"SLURM job {job} goes back into the queue and continues from there")
    code, said = _scontrol("requeue", job)
    if code:
        _say(f"SLURM job {job} could not be requeued: {said.strip()}")
    return code == 0


def _scontrol(*words: str) -> tuple[int, str]:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
