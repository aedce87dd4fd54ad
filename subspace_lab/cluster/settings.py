"""The `cluster` config group, and what one run asks SLURM for by it: the same for the launcher and for batch scripts.

How many processes a run has is said by `trainer.devices` and `trainer.num_nodes` alone; a cluster's file says what a
node has, and what goes with each process.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Since SLURM 22.05 srun does not take over sbatch's --cpus-per-task by itself.
CPUS_FOR_SRUN = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(kw_only=True)
class ClusterPlan:
    """One site's SLURM. Null leaves a value to the site.

    Args:
        partition: where jobs go.
        account: what they are charged to.
        qos: their quality of service.
        constraint: the features a node must have, such as a kind of GPU.
        gpus_per_node: how many a node has, which is also what trainer.devices=auto means; 0 for nodes without.
        gpus: how many a run takes if neither trainer.devices nor trainer.num_nodes says so; experiments set it to what
            was published.
        cpus_per_task: for each process; the data loader's workers want some.
        mem_gb_per_task: memory for each process, in GB.
        time_minutes: the time limit of a job, which is queued again and goes on when it is over.
        signal_seconds: how long before the time limit a run is told to save, at least one step and one checkpoint.
        requeue: whether a job is queued again when it is preempted or out of time.
        max_requeues: how often at most.
        array_parallelism: how many jobs of a sweep run at the same time.
        setup: shell lines before the program starts, such as `module load cuda`.
        env: environment variables.
        sbatch: any other options of sbatch, such as {mail-type: END}; true for one without a value.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 1
    gpus: int = 1
    cpus_per_task: int = 4
    mem_gb_per_task: int | None = None
    time_minutes: int = 60
    signal_seconds: int = 180
    requeue: bool = True
    max_requeues: int = 50
    array_parallelism: int = 32
    setup: Sequence[str] = ()
    env: Mapping[str, Any] = field(default_factory=dict)
    sbatch: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("gpus", "cpus_per_task", "time_minutes", "array_parallelism"):
            _at_least(1, name, getattr(self, name))
        for name in ("gpus_per_node", "signal_seconds", "max_requeues"):
            _at_least(0, name, getattr(self, name))
        if self.signal_seconds >= 60 * self.time_minutes:
            raise UserError(
                f"cluster.signal_seconds={self.signal_seconds} is not before the end of "
                f"cluster.time_minutes={self.time_minutes}",
                hint="lower it, or allow more time",
            )
        for name in self.env:
            if not _NAME.fullmatch(str(name)):
                raise UserError(f"cluster.env: '{name}' is no name of an environment variable")

    @classmethod
    def of(cls, cfg: DictConfig) -> ClusterPlan:
        """Return a composed configuration's cluster, the defaults if it has none."""
        from subspace_lab.schema import read, to_plain

        values = to_plain(read(cfg, "cluster", ""), "cluster") if cfg.get("cluster") is not None else {}
        return cls(**{key: value for key, value in values.items() if key != "_target_"})

    def setup_lines(self) -> list[str]:
        """Return the shell lines before the program, environment variables first."""
        exports = [f"export {name}={shlex.quote(str(value))}" for name, value in self.env.items()]
        return [*exports, CPUS_FOR_SRUN, *self.setup]


@dataclass(frozen=True)
class Request:
    """What one run asks for.

    Attributes:
        nodes: machines.
        tasks_per_node: processes on each, one per GPU.
        gpus_per_node: 0 for a run on CPUs.
        mem_gb: memory on each node, in GB; None is the site's default.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    mem_gb: int | None


def request(cfg: DictConfig) -> Request:
    """Return what a composed configuration asks for.

    Raises:
        UserError: a node has not as many GPUs, or the global batch cannot be divided among the processes.
    """
    plan = ClusterPlan.of(cfg)
    trainer = cfg.trainer
    on_cpu = trainer.accelerator == "cpu" or plan.gpus_per_node == 0
    tasks = int(trainer.devices) if trainer.devices != "auto" else 1 if on_cpu else plan.gpus_per_node
    if not on_cpu and tasks > plan.gpus_per_node:
        raise UserError(
            f"trainer.devices={tasks}, but a node has {plan.gpus_per_node} (cluster.gpus_per_node)",
            hint=f"trainer.devices={plan.gpus_per_node} trainer.num_nodes={-(-tasks // plan.gpus_per_node)}",
        )
    nodes = int(trainer.num_nodes)
    _check_batch(cfg, nodes * tasks)
    memory = None if plan.mem_gb_per_task is None else plan.mem_gb_per_task * tasks
    return Request(nodes, tasks, 0 if on_cpu else tasks, memory)


def recipe(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that give a run the number of GPUs its experiment was published with (`cluster.gpus`).

    Empty where the command line speaks of devices itself, for a run on CPUs, and for one GPU.

    Raises:
        UserError: they do not fill whole nodes.
    """
    plan = ClusterPlan.of(cfg)
    trainer = cfg.trainer
    typed = any(text.lstrip("+").startswith(("trainer.devices=", "trainer.num_nodes=")) for text in overrides)
    if typed or trainer.devices != 1 or trainer.num_nodes != 1 or trainer.accelerator == "cpu":
        return []
    if plan.gpus == 1 or plan.gpus_per_node == 0:
        return []
    nodes = -(-plan.gpus // plan.gpus_per_node)
    if plan.gpus % nodes:
        raise UserError(
            f"cluster.gpus={plan.gpus} does not fill whole nodes of {plan.gpus_per_node} GPUs",
            hint="give trainer.devices= and trainer.num_nodes=",
        )
    return [f"trainer.devices={plan.gpus // nodes}", *([f"trainer.num_nodes={nodes}"] if nodes > 1 else [])]


def launcher_value(name: str, cfg: DictConfig) -> Any:
    """Return what conf/hydra/launcher/submitit_slurm.yaml interpolates as `${slurm:name}`.

    Args:
        name: nodes, tasks_per_node, gpus_per_node, mem_gb, max_num_timeout, setup or additional_parameters.
        cfg: the root of the configuration.
    """
    plan = ClusterPlan.of(cfg)
    if name == "setup":
        return plan.setup_lines()
    if name == "additional_parameters":
        return {"requeue" if plan.requeue else "no-requeue": True, **plan.sbatch}
    if name == "max_num_timeout":
        return plan.max_requeues if plan.requeue else -1  # submitit counts down, and asks below zero no more
    wanted = request(cfg)
    return wanted.gpus_per_node or None if name == "gpus_per_node" else getattr(wanted, name)


def for_submitit(cfg: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of submitit's AutoExecutor, for what submits jobs of its own (a dimension search's cells).

    Args:
        cfg: the configuration; without a cluster there is nothing but what is given.
        given: parameters that count more, unless they are null.
    """
    told = {name: value for name, value in given.items() if value is not None}
    if cfg.get("cluster") is None:
        return told
    plan, wanted = ClusterPlan.of(cfg), request(cfg)
    ours = {
        "nodes": wanted.nodes,
        "tasks_per_node": wanted.tasks_per_node,
        "gpus_per_node": wanted.gpus_per_node or None,
        "cpus_per_task": plan.cpus_per_task,
        "mem_gb": wanted.mem_gb,
        "timeout_min": plan.time_minutes,
        **{f"slurm_{name}": getattr(plan, name) for name in ("partition", "account", "qos", "constraint")},
        "slurm_signal_delay_s": plan.signal_seconds,
        "slurm_max_num_timeout": launcher_value("max_num_timeout", cfg),
        "slurm_setup": plan.setup_lines(),
        "slurm_additional_parameters": launcher_value("additional_parameters", cfg),
    }
    return {name: value for name, value in ours.items() if value is not None} | told


def _check_batch(cfg: DictConfig, processes: int) -> None:
    """Find a global batch that cannot be divided now, not when the job's turn has come."""
    from subspace_lab.training.trainer import TrainerPlan

    data = cfg.get("data") or {}
    rows, whole = data.get("batch_size"), data.get("global_batch_size")
    if isinstance(rows, int) and isinstance(whole, int) and cfg.trainer.accumulate_grad_batches is None:
        TrainerPlan(devices=processes).accumulation(rows, whole)


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise UserError(f"cluster.{name} is {value}; it must be at least {least}")
