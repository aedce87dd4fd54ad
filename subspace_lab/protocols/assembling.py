"""The parts around a training run that every protocol that trains has: callbacks in their order, loggers, the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from subspace_lab import build

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from omegaconf import DictConfig

    from subspace_lab.methods.base import Method
    from subspace_lab.training.callbacks.checkpointing import Checkpointing
    from subspace_lab.training.callbacks.method import MethodDriver
    from subspace_lab.training.callbacks.progress import ProgressDisplay
    from subspace_lab.training.trainer import TrainerPlan


@dataclass
class Crew:
    """The callbacks of a run.

    Attributes:
        callbacks: all of them, in the order in which their hooks run.
        driver: drives the method and writes the rows.
        checkpointing: writes the checkpoints.
        progress: what is shown; None if nothing is.
    """

    callbacks: list[Any]
    driver: MethodDriver
    checkpointing: Checkpointing
    progress: ProgressDisplay | None


def build_plan(cfg: DictConfig) -> TrainerPlan:
    """The trainer group on this machine; a number of steps that was typed beats passes that a file asks for."""
    plan: TrainerPlan = build.instantiate(cfg.trainer)
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = {str(text).lstrip("+").split("=", 1)[0] for text in typed}
    if "trainer.max_steps" in keys and "trainer.max_epochs" not in keys:
        plan.max_epochs = None
    return plan.resolve()


def crew(
    cfg: DictConfig,
    plan: TrainerPlan,
    run_dir: Path,
    label: str,
    resume_dir: Path,
    more: Sequence[Callback] = (),
) -> Crew:
    """Make the callbacks of a run.

    Args:
        cfg: the configuration, whose `callbacks` are put in after the run's own.
        plan: the resolved trainer group.
        run_dir: where checkpoints go.
        label: what progress lines call this run.
        resume_dir: the folder that `subspace-lab resume` would be given.
        more: a protocol's own, which see a step before it is saved.
    """
    from subspace_lab.training.callbacks.buffers import SharedBuffers
    from subspace_lab.training.callbacks.checkpointing import Checkpointing
    from subspace_lab.training.callbacks.interrupt import InterruptWatch
    from subspace_lab.training.callbacks.method import MethodDriver
    from subspace_lab.training.callbacks.progress import ProgressDisplay
    from subspace_lab.training.callbacks.state import RunState
    from subspace_lab.training.callbacks.timing import Timing

    timing = Timing()
    driver = MethodDriver(plan.log_every, timing)
    checkpointing = Checkpointing(run_dir, plan.checkpoint_every, timing)
    callbacks: list[Any] = [RunState(), timing, driver, *more]
    callbacks += [build.instantiate(node) for node in (cfg.get("callbacks") or {}).values() if node is not None]
    if plan.world_size > 1:
        callbacks.append(SharedBuffers())
    progress = ProgressDisplay(driver, label, bar=plan.wants_bar()) if plan.progress != "off" else None
    if progress is not None:
        callbacks.append(progress)
    # The last two: everything else has seen the step before it is saved, and it is saved before the run may stop.
    callbacks += [checkpointing, InterruptWatch(checkpointing, resume_dir)]
    return Crew(callbacks, driver, checkpointing, progress)


def log_matrix(loggers: Sequence[Any], names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Hand an accuracy matrix to the loggers that keep tables.

    Args:
        loggers: of the run.
        names: of the tasks.
        rows: of accuracies, one for each task learnt, or one of all tasks learnt together.
    """
    learnt = names if len(rows) == len(names) else ["all"]
    cells = [[name, *row, *[None] * (len(names) - len(row))] for name, row in zip(learnt, rows, strict=True)]
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table("accuracy_matrix", ["after", *names], cells)


def close_loggers(loggers: Sequence[Any]) -> None:
    """Everything is logged: let every logger write what it holds and end."""
    for logger in loggers:
        logger.finalize("success")
        close = getattr(logger, "close", None)  # Lightning knows no end but that of a loop
        if close is not None:
            close()


def make_loggers(cfg: DictConfig, run_dir: Path, method: Method) -> list[Any]:
    """The loggers of the `logger` group, told what is being run."""
    from subspace_lab.training.wandb_about import identity

    loggers: list[Any] = build.instantiate(cfg.logger).create(run_dir, identity(cfg, run_dir, method.name))
    return loggers
