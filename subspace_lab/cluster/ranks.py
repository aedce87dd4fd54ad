"""Ranks that somebody else started (srun, torchrun): as many as the configuration says, and one folder for all.

Under SLURM the job's id names the folder. torchrun's ranks have nothing in common but the agent's store: the first rank
decides there for all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PATIENCE = timedelta(minutes=10)
_store: Any = None  # kept: where no agent serves it, the first rank does


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agreed(decide: Callable[[], list[str] | None]) -> list[str] | None:
    """Return what the first rank decides, on every rank; without torchrun every process decides for itself.

    Args:
        decide: called on the first rank.

    Raises:
        SystemExit: on the other ranks, if the first one failed, which tells why.
    """
    if not under_torchrun() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    store = _agent_store()
    key = f"subspace-lab/decided/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if os.environ["RANK"] != "0":
        answer = json.loads(store.get(key))
        if "failed" in answer:
            raise SystemExit(2)
        decided: list[str] | None = answer["decided"]
        return decided
    try:
        decided = decide()
    except BaseException:
        store.set(key, json.dumps({"failed": True}))
        raise
    store.set(key, json.dumps({"decided": decided}))
    return decided


def check(cfg: DictConfig) -> None:
    """Refuse a number of processes that is not the configuration's: Lightning would raise, or wait for the others.

    Raises:
        UserError: see above.
        SystemExit: the same, on the other ranks.
    """
    devices, nodes = cfg.trainer.devices, int(cfg.trainer.num_nodes)
    if devices == "auto":
        return
    wanted = f"trainer.devices={devices} and trainer.num_nodes={nodes}"
    if under_torchrun():
        started, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if started != devices * nodes:
            _refuse(f"torchrun started {started} processes, for {wanted}", _devices(local, started // local))
        return
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") or tasks == 1 == devices * nodes:
        return
    if "SLURM_NTASKS" not in os.environ:
        return
    if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
        _refuse(f"this SLURM job has {tasks} tasks, but only one process was started", "start it with srun")
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        _refuse("this SLURM job was given --ntasks", "use --ntasks-per-node=, as `subspace-lab sbatch` does")
    there = int(os.environ.get("SLURM_NNODES") or 1)
    each = int(os.environ.get("SLURM_NTASKS_PER_NODE") or tasks)
    if (each, there) != (devices, nodes):
        _refuse(f"SLURM started {each} processes on each of {there} nodes, for {wanted}", _devices(each, there))


def _devices(each: int, nodes: int) -> str:
    return f"trainer.devices={each}" + (f" trainer.num_nodes={nodes}" if nodes > 1 else "")


def _refuse(message: str, hint: str) -> None:
    from subspace_lab.training.environment import is_main_process

    if not is_main_process():
        raise SystemExit(2)
    raise UserError(message, hint=hint)


def _agent_store() -> Any:
    """Return a client of the store that torchrun's agent serves, or that of the first rank where it serves none."""
    global _store
    if _store is None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"
        _store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serves,
            timeout=_PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
    return _store
