"""A stand-in for a training run whose accuracy is a formula, importable by worker processes too."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.outcome import Outcome

D = 17_610
FAKE = {"_target_": "search.fakes.FakeFit", "train_accuracy": False}


def configuration(root: Path, **data: Any) -> DictConfig:
    """A composed configuration as small as a search needs it; `data` steers the fake."""
    return OmegaConf.create(
        {
            "name": "fake",
            "seed": 0,
            "tags": [],
            "resume": None,
            "compare": None,
            "estimate": False,
            "export": True,
            "published": None,
            "protocol": {"anything": 1},
            "model": {"size": 1},
            "data": {"scale": 55.0, "best": 1.0, "recipe": {"global_baseline": 1.0}, **data},
            "optimizer": {"lr": 0.01},
            "subspace": None,
            "method": {"name": "fake", "d": None, "d_max": None, "lr_factor": 1.0, "seed": "${seed}", "initial": None},
            "trainer": {"max_steps": 100, "checkpoint_every": 500, "progress": "auto", "devices": 1, "num_nodes": 1},
            "logger": {},
            "paths": {"output_root": str(root / "outputs"), "output_dir": str(root / "outputs" / "fake" / "run")},
        }
    )


class FakeFit:
    """Accuracy 0.98·(1 − exp(−d/scale)) at the best learning rate, less beside it, and a little noise per seed."""

    def __init__(self, train_accuracy: bool = False) -> None:
        self.train_accuracy = train_accuracy

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        data, d = cfg.data, cfg.method.get("d")
        with (run_dir / "lives").open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
        self._train(run_dir, float(data.get("seconds", 0)), label)
        if d == data.get("crash_at", -1):
            raise ValueError("singular matrix")
        if d == data.get("mistake_at", -1):
            raise UserError("a wrong word", hint="the right word")
        if d == data.get("die_at", -1):
            os._exit(9)
        factor = cfg.optimizer.lr / 0.01 if d is None else cfg.method.lr_factor
        top = 0.98 if d is None else 0.98 * (1 - math.exp(-d / data.scale))
        noise = 0.004 * math.sin(12.9898 * (d or 1) + 78.233 * cfg.seed)
        accuracy = max(0.1, top - 0.05 * abs(math.log(factor / data.best)) + noise)
        lost = factor >= data.get("diverges_from", math.inf)
        if d is not None:
            (run_dir / "solution.safetensors").write_text(str(cfg.method.initial))
        return Outcome(
            metrics={
                "val/accuracy": accuracy + 0.002,
                "test/accuracy": math.nan if lost else accuracy,
                "val/loss": math.nan if lost else 1 - accuracy,
                **({"train/accuracy": accuracy} if self.train_accuracy else {}),
                **({"model/parameters": float(D)} if d is None else {"subspace/d": float(d), "subspace/D": float(D)}),
            },
            timing={"steps": 100},
        )

    def _train(self, run_dir: Path, seconds: float, label: str) -> None:
        """Take a while, in steps; a signal ends it after the step, and the next life goes on there."""
        progress = run_dir / "steps"
        steps = int(progress.read_text()) if progress.is_file() else 0
        interrupt.request.armed = True
        try:
            while steps < seconds * 50:
                time.sleep(0.02)
                steps += 1
                if interrupt.requested() is not None:
                    progress.write_text(str(steps))
                    raise Interrupted(f"{label} interrupted")
        finally:
            interrupt.request.armed = False
