"""The text of a batch script: a pure function of a composed configuration and of the words that made it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace_lab.cluster.settings import ClusterPlan, request

if TYPE_CHECKING:
    from omegaconf import DictConfig

LOGS = "slurm"


def script(
    cfg: DictConfig,
    words: Sequence[str],
    *,
    name: str,
    command: str,
    about: Sequence[str] = (),
    cells: Sequence[Sequence[str]] | None = None,
    cell_dir: str = "",
) -> str:
    """Return a batch script for a run, or for one array with a task for each cell of a sweep.

    Args:
        cfg: the composed configuration; of a sweep any cell's.
        words: the overrides of the run, or those all cells share.
        name: the job's name.
        command: what is typed to write this script again.
        about: further comment lines.
        cells: the overrides of each cell.
        cell_dir: the folder of their run folders.
    """
    plan = ClusterPlan.of(cfg)
    lines = ["#!/bin/bash", f"# Made by: {command}", *(f"# {line}" for line in about)]
    lines += [_sbatch(key, value) for key, value in _options(cfg, plan, name, cells).items()]
    logs = f"{cfg.paths.output_root}/{LOGS}"
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if cells is not None else "$SLURM_JOB_ID"
    folder = shlex.quote(logs)
    lines += [
        "set -eo pipefail",
        "# SLURM would lose the job, without a word, in a folder that does not exist: the log is opened here instead.",
        f"if [ /dev/stdout -ef /dev/null ]; then mkdir -p {folder}; "
        f'exec >>{folder}/"$SLURM_JOB_NAME-{number}.log" 2>&1; fi',
        *plan.setup_lines(),
    ]
    extra = ""
    if cells is not None:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        lines += [f"  {index}) cell=({shlex.join(cell)}) ;;" for index, cell in enumerate(cells)]
        lines += ["esac", f'folder={shlex.quote(cell_dir)}/"$SLURM_ARRAY_JOB_ID/$SLURM_ARRAY_TASK_ID"']
        extra = ' "${cell[@]}" "hydra.run.dir=\'$folder\'"'
    # exec: signals to the batch shell then reach srun, which passes them on, where bash would die of them.
    start = ["exec srun --kill-on-bad-exit=1 subspace-lab", *map(shlex.quote, words)]
    return "\n".join([*lines, " ".join(start) + extra + ' "$@"']) + "\n"


def _options(cfg: DictConfig, plan: ClusterPlan, name: str, cells: Sequence[Sequence[str]] | None) -> Mapping[str, Any]:
    wanted = request(cfg)
    options: dict[str, Any] = {
        "job-name": name,
        "array": f"0-{len(cells) - 1}%{plan.array_parallelism}" if cells is not None else None,
        "partition": plan.partition,
        "account": plan.account,
        "qos": plan.qos,
        "constraint": plan.constraint,
        "nodes": wanted.nodes,
        "ntasks-per-node": wanted.tasks_per_node,
        "gpus-per-node": wanted.gpus_per_node or None,
        "cpus-per-task": plan.cpus_per_task,
        "mem": None if wanted.mem_gb is None else f"{wanted.mem_gb}G",
        "time": _duration(plan.time_minutes),
        "signal": f"USR2@{plan.signal_seconds}",
        "requeue" if plan.requeue else "no-requeue": True,
        "open-mode": "append",
        "output": "/dev/null",
    }
    return {key: value for key, value in (options | dict(plan.sbatch)).items() if value not in (None, False)}


def _sbatch(key: str, value: Any) -> str:
    return f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={shlex.quote(str(value))}"


def _duration(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"
