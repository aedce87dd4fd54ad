"""The command line in the test's process, in an empty folder; a stand-in for training that writes what a run writes."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from in_process import Answer, Command, command
from omegaconf import DictConfig

from subspace_lab import rundir

__all__ = ["Answer", "Command", "command"]


@dataclass
class Training:
    """Stands in for `subspace_lab.run.run`.

    Attributes:
        figure: from a configuration to the validation loss; what it raises ends the run.
        cells: the (method, seed, learning rate) of every run begun.
    """

    figure: Callable[[DictConfig], float]
    cells: list[tuple[str, int, float]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> float:
        from subspace_lab import schema
        from subspace_lab.reporting import results
        from subspace_lab.run import choices, task_overrides  # type: ignore[attr-defined]

        self.cells.append((choices()["method"], int(cfg.seed), float(cfg.optimizer.lr)))
        folder = Path(cfg.paths.output_dir)
        self.folders.append(folder)
        (folder / rundir.HASH_FILE).write_text(schema.config_hash(cfg) + "\n")
        about: dict[str, Any] = {
            "name": str(cfg.name),
            "method": choices()["method"],
            "seed": int(cfg.seed),
            "config_hash": schema.config_hash(cfg),
            "overrides": task_overrides(),
            "choices": choices(),
            "timing": {"steps": 10},
        }
        try:
            value = self.figure(cfg)
        except BaseException as error:
            from subspace_lab.reporting.record import status_of

            results.write(
                folder, about | {"status": status_of(error), "metrics": {}, "message": str(error).split("\n")[0]}
            )
            raise
        done = {"status": "completed", "trained": True, "objective": "val/loss", "metrics": {"val/loss": value}}
        results.write(folder, about | done)
        return value


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """Put the stand-in in the place of training, and let every configuration pass as valid."""
    import subspace_lab.run as real
    from subspace_lab import schema

    made = Training(lambda cfg: float(cfg.seed))
    module = types.ModuleType("subspace_lab.run")
    module.run = made  # type: ignore[attr-defined]
    module.choices, module.task_overrides = real.choices, real.task_overrides  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "subspace_lab.run", module)
    monkeypatch.setattr(schema, "validate", lambda cfg: None)
    return made


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found
