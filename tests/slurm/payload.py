"""Stands where `subspace-lab` would in a job: notes signals as a run does, saves for a second, asks to be requeued."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from subspace_lab import interrupt
from subspace_lab.cluster import requeue
from subspace_lab.cluster.settings import ClusterPlan

interrupt.install()
interrupt.request.armed = True
rank, life = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
about = {
    "words": sys.argv[1:],
    "node": os.environ["SLURMD_NODENAME"],
    "tasks_per_node": os.environ.get("SLURM_NTASKS_PER_NODE"),
    "cpus": os.environ.get("SLURM_CPUS_PER_TASK"),
    "gpus": os.environ.get("SLURM_GPUS_ON_NODE"),
}
Path(f"started{task}-{rank}-{life}.json").write_text(json.dumps(about))
seconds = float(os.environ.get("PAYLOAD_SECONDS", "0")) if life == "0" else 0.0
deadline = time.monotonic() + seconds
while interrupt.requested() is None and time.monotonic() < deadline:
    time.sleep(0.05)
signum = interrupt.requested()
if signum is not None:
    time.sleep(1)  # a checkpoint takes its time
    Path(f"saved-{rank}-{signum}").touch()
    if rank == "0":
        again = requeue.after_saving(signum, ClusterPlan(max_requeues=int(os.environ.get("PAYLOAD_MOST", "9"))))
        Path(f"asked-{again}").touch()
        sys.exit(130)
sys.exit(int(os.environ.get("PAYLOAD_EXIT", "0")))
