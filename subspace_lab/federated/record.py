"""Who has which examples and who takes part in which round, written down before the first one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace_lab.reporting.results import write_text

if TYPE_CHECKING:
    from subspace_lab.federated.client import ClientPool

ROUNDS_FILE = "rounds.jsonl"
PARTITION_FILE = "partition.json"


def write(pool: ClientPool, rounds: list[int], run_dir: Path) -> str:
    """Write partition.json and rounds.jsonl.

    Args:
        pool: the clients.
        rounds: of each task.
        run_dir: the run folder.

    Returns:
        A hash of who has which examples of which task.
    """
    digest, tasks = hashlib.blake2b(digest_size=16), []
    for index, task in enumerate(pool.tasks):
        targets = getattr(task.data.parts.train, "targets", None)
        clients: list[dict[str, Any]] = []
        for share in pool.shares(index):
            digest.update(share.tobytes() + b"/")
            about: dict[str, Any] = {"examples": len(share)}
            if targets is not None:
                labels, counts = np.unique(targets[share], return_counts=True)
                about["labels"] = {str(label): int(count) for label, count in zip(labels, counts, strict=True)}
            clients.append(about)
        tasks.append({"task": task.name, "clients": clients})
    hashed = digest.hexdigest()
    partition = {**pool.federation.describe(pool.seed), "hash": hashed, "tasks": tasks}
    write_text(run_dir / PARTITION_FILE, json.dumps(partition) + "\n")
    plan = [task for task, count in enumerate(rounds) for _ in range(count)]
    lines = [
        json.dumps(
            {"round": k + 1, "task": task + 1, "clients": pool.federation.sample(k, pool.seed, pool.method.always())}
        )
        for k, task in enumerate(plan)
    ]
    write_text(run_dir / ROUNDS_FILE, "".join(f"{line}\n" for line in lines))
    return hashed
