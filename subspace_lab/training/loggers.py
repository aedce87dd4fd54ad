"""The `logger` config group: metrics.csv in the run folder, Weights & Biases, or both.

Only the standard library is imported here; Lightning and wandb come in when a logger is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from subspace_lab.training.wandb_about import RunIdentity


@dataclass
class Loggers:
    """Which loggers a run has.

    Args:
        csv: write metrics.csv into the run folder (plots are drawn from it).
        wandb: log to Weights & Biases; offline without an API key, and WANDB_MODE is respected.
        project: W&B project.
        entity: W&B team or user; null is the account's default.
        group: W&B group; null is the sweep, or the run's `name`.
        job_type: W&B job type; null is the method.
        tags: W&B tags beside the run's own: method, model, data, optimizer, protocol and its `tags`.
    """

    csv: bool = True
    wandb: bool = False
    project: str = "subspace-lab"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()

    def create(self, run_dir: Path, about: RunIdentity) -> list[Logger]:
        """Return the loggers of one run; on other ranks than the first they write nothing.

        Args:
            run_dir: the run folder, which also keeps the W&B run id for a resume.
            about: how the run is to be found.
        """
        from subspace_lab.training.csv_logger import RunCSVLogger
        from subspace_lab.training.environment import is_main_process

        loggers: list[Logger] = [RunCSVLogger(run_dir / "metrics.csv")] if self.csv else []
        if self.wandb and is_main_process():
            from subspace_lab.training.wandb_logger import WandbRunLogger

            settings = {
                "project": self.project,
                "entity": self.entity,
                "group": self.group or about.group,
                "job_type": self.job_type or about.method,
                "tags": list(dict.fromkeys([*about.tags, *self.tags])),
                "config": dict(about.config),
            }
            loggers.append(WandbRunLogger(run_dir, settings, announce=not about.in_sweep))
        return loggers
