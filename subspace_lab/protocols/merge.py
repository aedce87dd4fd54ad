"""`protocol=merge`: experts of several tasks merged into one model and measured on all; or checkpoints merged.

With `merge.models` as a list, files are merged and nothing is trained or measured. Otherwise the tasks of `data` have
experts, trained here (`experts`) or given by name in `merge.models`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace_lab import build, interrupt
from subspace_lab.errors import Interrupted, UserError, did_you_mean
from subspace_lab.protocols import assembling
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.training import environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.merging.base import Merge
    from subspace_lab.merging.settings import MergeSettings
    from subspace_lab.training.trainer import TrainerPlan

MERGED_FOLDER = "merged"


class Merging:
    """Merges models.

    Args:
        part: the part of each task on which accuracies are measured.
        scales: λ to choose from by validation accuracy; null takes the method's `scale`.
        pretrain_epochs: passes of the encoder over what the data have it pretrained on.
        pretrain_lr: its learning rate.
        gamma: largest logit of the frozen heads.
        cross: measure every expert on every task.

    Raises:
        UserError: a number that is not positive.
    """

    def __init__(
        self,
        part: Literal["test", "validation"] = "test",
        scales: Sequence[float] | None = None,
        pretrain_epochs: int = 10,
        pretrain_lr: float = 1e-3,
        gamma: float = 10.0,
        cross: bool = False,
    ) -> None:
        for name, value in (("pretrain_epochs", pretrain_epochs), ("pretrain_lr", pretrain_lr), ("gamma", gamma)):
            if value <= 0:
                raise UserError(f"protocol.{name}={value}: expected a positive number")
        if scales is not None and (not scales or min(scales) < 0):
            raise UserError(f"protocol.scales={list(scales)}: expected numbers of at least 0, or null")
        self.part, self.scales, self.cross = part, scales, cross
        self.pretrain_epochs, self.pretrain_lr, self.gamma = pretrain_epochs, pretrain_lr, gamma

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Merge, and return the figures.

        Args:
            cfg: the validated configuration.
            run_dir: where the merged weights and the plots go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given.

        Raises:
            UserError: checkpoints that do not fit together, a method that lacks what it needs.
            Interrupted: a signal asked to stop; experts that are trained are kept.
        """
        environment.quiet_lightning()
        method: Merge = build.instantiate(cfg.method)
        settings: MergeSettings = build.instantiate(cfg.merge)
        try:
            if settings.models is not None and not settings.named:
                return self._files(cfg, method, settings, run_dir)
            return self._tasks(cfg, method, settings, run_dir, label, resume_dir)
        except KeyboardInterrupt:
            signal = interrupt.requested()
            what = "interrupted" if signal is None else f"interrupted by signal {signal}"
            raise Interrupted(f"{what} while merging; continue with: subspace-lab resume {resume_dir}") from None

    def _files(self, cfg: DictConfig, method: Merge, settings: MergeSettings, run_dir: Path) -> Outcome:
        from subspace_lab.merging.files import merge_files
        from subspace_lab.protocols.experts import tell

        began = time.perf_counter()
        output = Path(settings.output).expanduser() if settings.output else run_dir / MERGED_FOLDER
        found = merge_files(method, settings, output, lambda line: tell(f"{cfg.method.name}  {line}"))
        figures = {f"merge/{name}": float(value) for name, value in method.metrics().items()}
        seconds = time.perf_counter() - began
        return Outcome(
            metrics={**figures, "merge/seconds": float(found.get("seconds", seconds))},
            timing={"wall_seconds": seconds},
            objective="merge/seconds",
            sections={"merged_files": {"method": str(cfg.method.name), "output": str(output), **found}},
        )

    def _tasks(
        self, cfg: DictConfig, method: Merge, settings: MergeSettings, run_dir: Path, label: str, resume_dir: Path
    ) -> Outcome:
        from subspace_lab.protocols.merge_bench import Bench

        began = time.perf_counter()
        plan = self._plan(cfg)
        suite: Any = build.instantiate(cfg.data)
        if not hasattr(suite, "pretraining"):
            raise UserError(
                "protocol=merge needs several tasks, and these data are one",
                hint="data=digits_tasks, image_tasks …; or merge.models=[a.safetensors,b.safetensors] merge.base=…",
            )
        given = suite.names if settings.models is None else settings.models
        missing = next((name for name in suite.names if name not in given), None)
        if missing is not None:
            raise UserError(
                f"merge.models has no checkpoint for task '{missing}' of data={suite.dataset}",
                hint=did_you_mean(missing, given) or f"there are: {', '.join(given)}",
            )
        bench = Bench(self, cfg, plan, method, settings, suite, run_dir, label, resume_dir)
        outcome = bench.run()
        outcome.timing["wall_seconds"] = time.perf_counter() - began
        self._log(cfg, run_dir, outcome, suite.names)
        return outcome

    def _plan(self, cfg: DictConfig) -> TrainerPlan:
        plan = assembling.build_plan(cfg)
        if plan.world_size > 1:
            raise UserError(
                "protocol=merge runs in one process", hint="trainer.devices=1; seeds beside each other: -m seed=0,1,2"
            )
        return plan

    def _log(self, cfg: DictConfig, run_dir: Path, outcome: Outcome, names: Sequence[str]) -> None:
        from subspace_lab.training.wandb_about import identity

        found = outcome.sections["merge"]
        loggers: list[Any] = build.instantiate(cfg.logger).create(run_dir, identity(cfg, run_dir, str(cfg.method.name)))
        rows = [
            [name, *(found[of][name]["accuracy"] if found.get(of) else None for of in ("base", "merged", "experts"))]
            for name in names
        ]
        for logger in loggers:
            logger.log_metrics(outcome.metrics, step=0)
            if hasattr(logger, "log_table"):
                logger.log_table("accuracies", ["task", "base", "merged", "expert"], rows)
        assembling.close_loggers(loggers)
