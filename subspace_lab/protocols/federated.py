"""`protocol=federated`: clients learn from their own examples, a server makes one model of what they send.

Tasks come one after another where the data are a sequence (`scenario`); each has rounds of its own.  The server's state
between two rounds is all there is to a checkpoint, so a run resumes at the end of any round.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig

from subspace_lab import build, interrupt
from subspace_lab.errors import UserError
from subspace_lab.methods.base import Origin
from subspace_lab.protocols import assembling
from subspace_lab.protocols.fit import EXPORT_FOLDER, export, find_checkpoint
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.schema import to_plain
from subspace_lab.training import environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.federated.client import ClientPool
    from subspace_lab.federated.exchange import Engine
    from subspace_lab.protocols.rounds import FederatedRun
    from subspace_lab.training.trainer import TrainerPlan

_LENGTHS = ("max_steps", "max_epochs")


class Federated:
    """Trains one model by rounds of local training and aggregation.

    `trainer.log_every`, `val_every` and `checkpoint_every` count rounds; `federation` says how long clients train.

    Args:
        part: the part of each task on which accuracies are measured: test, or validation, to choose
            hyperparameters by.
    """

    def __init__(self, part: Literal["test", "validation"] = "test") -> None:
        self.part = part

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Run all rounds of all tasks, or go on with them, and return the figures.

        Args:
            cfg: the validated configuration.
            run_dir: where checkpoints, rows and the export go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given.

        Raises:
            UserError: parts that do not fit together, no usable checkpoint at the path given, a client that failed.
            Interrupted: a signal asked to stop; everything is saved.
        """
        began = time.perf_counter()
        environment.quiet_lightning()
        plan = self._plan(cfg)
        from subspace_lab.federated.client import ClientPool
        from subspace_lab.protocols.rounds import FederatedRun

        pool = ClientPool(cfg, "cuda" if plan.accelerator == "gpu" else "cpu")
        if pool.federation.secure_aggregation and pool.method.needs_each:
            raise UserError(
                f"method={pool.method.name} compares clients' updates, which secure aggregation hides",
                hint="method=fedavg or fot, or federation.secure_aggregation=false",
            )
        run = FederatedRun(cfg, plan, pool, run_dir, label, resume_dir, part=self.part)
        run.resume(find_checkpoint(cfg.resume, run_dir))
        interrupt.request.armed = True
        try:
            make_engine(cfg, pool).run(run.learn)
        finally:
            interrupt.request.armed = False
            run.progress.stop()
        assembling.log_matrix(run.loggers, [task.name for task in pool.tasks], run.standing.matrix)
        assembling.close_loggers(run.loggers)
        model = run.model.module()
        if cfg.export:
            export(model, pool.method, run_dir / EXPORT_FOLDER)
        pool.method.save(model, run_dir, Origin(cfg.seed, to_plain(cfg.model), pool.model_arguments))
        return self._result(run, time.perf_counter() - began)

    def _plan(self, cfg: DictConfig) -> TrainerPlan:
        typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        for key in (str(text).lstrip("+").split("=", 1)[0] for text in typed):
            if key.removeprefix("trainer.") in _LENGTHS and key.startswith("trainer."):
                raise UserError(
                    f"{key} is of training in one place, and protocol=federated counts rounds",
                    hint="federation.rounds, federation.local_epochs or federation.local_steps",
                )
        plan: TrainerPlan = build.instantiate(cfg.trainer).resolve()
        if plan.world_size > 1:
            raise UserError(
                "protocol=federated runs in one process", hint="trainer.devices=1; federation.engine=flower"
            )
        if plan.precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"trainer.precision={plan.precision}: updates are averaged in float32",
                hint="trainer.precision=32-true or bf16-mixed",
            )
        if cfg.get("callbacks"):
            raise UserError(
                f"callbacks {', '.join(cfg.callbacks)} are Lightning's, and protocol=federated has none",
                hint="leave out callbacks=",
            )
        if cfg.data.get("mixup") or cfg.data.get("cutmix"):
            raise UserError("clients do not mix examples", hint="data.mixup=0 data.cutmix=0")
        return plan

    def _result(self, run: FederatedRun, wall_seconds: float) -> Outcome:
        from subspace_lab.continual import metrics

        pool, standing = run.pool, run.standing
        names = [task.name for task in pool.tasks]
        found = metrics.figures(standing.matrix, run.examples)
        parameters = list(pool.model.parameters())
        figures = {
            **found,
            "final_error": 1 - found["final_accuracy"],
            **run.last_validation,
            "communication/up_bytes": float(standing.bytes_up),
            "communication/down_bytes": float(standing.bytes_down),
            "communication/round_bytes": float(run.round_bytes()),
            "server/seconds": standing.server_seconds,
            "clients/seconds": standing.client_seconds,
            "task_end/seconds": sum(standing.task_end_seconds),
            "subspace/basis_bytes": float(pool.method.basis_bytes()),
            "model/parameters": float(sum(p.numel() for p in parameters)),
        }
        definitions = {name: metrics.DEFINITIONS[name] for name in found}
        sections: dict[str, Any] = {
            "federated": {
                **pool.federation.describe(run.seed),
                "rounds": run.rounds,
                "partition_hash": run.partition_hash,
                "part": self.part,
                "task_end_seconds": standing.task_end_seconds,
                "task_end_bytes": standing.task_end_bytes,
                "definitions": definitions
                | {
                    "communication/up_bytes": "from clients to server, the whole run, float32",
                    "communication/down_bytes": "from server to clients, the whole run, float32",
                    "communication/round_bytes": "both ways, a round of training",
                    "server/seconds": "aggregation and projection of all rounds, in wall time",
                },
            }
        }
        if pool.scenario is not None:
            sections["continual"] = {
                "scenario": pool.scenario.describe(),
                "head": pool.head,
                "part": self.part,
                "schedule": "sequence",
                "tasks": names,
                "examples": run.examples,
                "accuracy_matrix": standing.matrix,
                "ranks": standing.ranks,
                "dimensions": pool.method.dimensions(),
                "definitions": definitions,
            }
        return Outcome(
            metrics=figures,
            timing={
                "steps": standing.round,
                "wall_seconds": wall_seconds,
                "server_seconds": standing.server_seconds,
                "client_seconds": standing.client_seconds,
            },
            memory={
                "basis_bytes": float(pool.method.basis_bytes()),
                "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            },
            data=pool.data.describe(),
            objective="final_error",
            sections=sections,
        )


def make_engine(cfg: DictConfig, pool: ClientPool) -> Engine:
    """Who runs the clients, by `federation.engine`."""
    if pool.federation.engine == "flower":
        from subspace_lab.federated.flower.engine import FlowerEngine

        federation = pool.federation
        return FlowerEngine(cfg, federation.clients, device=str(pool.device), secure=federation.secure_aggregation)
    from subspace_lab.federated.exchange import InProcess

    return InProcess(pool)
