"""`protocol=continual`: learn the tasks of a sequence one after another and measure what is left of the earlier ones.

Each task is one fit of Lightning's with an optimizer of its own, whose steps go on counting; the checkpoint of any step
says which task it belongs to (`training.callbacks.tasks`), so a run resumes in the middle of one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from subspace_lab import build
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.methods.base import Origin
from subspace_lab.protocols import assembling
from subspace_lab.protocols.fit import EXPORT_FOLDER, Fit, export, find_checkpoint
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.schema import to_plain
from subspace_lab.training import environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.protocols.task_sequence import TaskSequence
    from subspace_lab.training.trainer import TrainerPlan


class Continual(Fit):
    """Trains one model on a sequence of tasks.

    `trainer.max_epochs`, `trainer.max_steps` and `scheduler` are of each task.

    Args:
        part: the part of each task on which accuracies are measured: test, or validation, to choose
            hyperparameters by.
        attack: fgsm or pgd: measure accuracies under attack as well; null: do not.
        epsilon: largest change of an input under attack, in units of the normalised input.
        attack_steps: of pgd.

    Raises:
        UserError: epsilon or attack_steps not positive.
    """

    def __init__(
        self,
        part: Literal["test", "validation"] = "test",
        attack: Literal["fgsm", "pgd"] | None = None,
        epsilon: float = 0.1,
        attack_steps: int = 10,
    ) -> None:
        super().__init__()
        if epsilon <= 0 or attack_steps < 1:
            name, value = ("epsilon", epsilon) if epsilon <= 0 else ("attack_steps", attack_steps)
            raise UserError(f"protocol.{name}={value}: expected a positive number")
        self.part, self.attack, self.epsilon, self.attack_steps = part, attack, epsilon, attack_steps

    @override
    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Learn the sequence, or go on with it, and return the figures.

        Args:
            cfg: the validated configuration.
            run_dir: where checkpoints, rows and the export go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given.

        Raises:
            UserError: parts that do not fit together, no usable checkpoint at the path given.
            Interrupted: a signal asked to stop; everything is saved.
        """
        began = time.perf_counter()
        environment.quiet_lightning()
        if cfg.get("scenario") is None:
            raise UserError(
                "protocol=continual needs a sequence of tasks, and these data are one task",
                hint="scenario=permuted or scenario=split makes a sequence of them; data=permuted_digits is one",
            )
        sequence = self._sequence(cfg, assembling.build_plan(cfg), run_dir, label, resume_dir)
        sequence.resume(find_checkpoint(cfg.resume, run_dir))
        try:
            while sequence.has_more():
                sequence.train()
                self._finish(sequence, run_dir, resume_dir)
        except SystemExit:  # Lightning's way to end on a second Ctrl-C, with an exit code of its own
            raise KeyboardInterrupt from None
        sequence.log_matrix()
        assembling.close_loggers(sequence.loggers)
        if sequence.leads:
            if cfg.export:
                export(sequence.module.model, sequence.method, run_dir / EXPORT_FOLDER)
            origin = Origin(cfg.seed, to_plain(cfg.model), sequence.model_arguments)
            sequence.method.save(sequence.module.model, run_dir, origin)
        return self._result(sequence, time.perf_counter() - began)

    def _sequence(
        self, cfg: DictConfig, plan: TrainerPlan, run_dir: Path, label: str, resume_dir: Path
    ) -> TaskSequence:
        from subspace_lab.protocols.task_sequence import TaskSequence

        method, scenario, data = build.build_method(cfg), build.instantiate(cfg.scenario), build.build_data(cfg)
        plan.check_method(method, plan.accumulation(data.batch_size, getattr(data, "global_batch_size", None)))
        data.configure(plan.rank, plan.world_size, cfg.seed)
        data.prepare_data()
        data.setup("fit")
        sequence = TaskSequence(cfg, plan, method, scenario, data, run_dir, label, resume_dir, part=self.part)
        if self.attack is not None:
            from subspace_lab.continual.attack import make_attack

            sequence.objective_attack = make_attack(self.attack, self.epsilon, self.attack_steps, cfg.seed, data)
        return sequence

    def _finish(self, sequence: TaskSequence, run_dir: Path, resume_dir: Path) -> None:
        """End the task that has been trained: what it leaves behind, and the accuracies after it."""
        from subspace_lab.training import checkpoint

        try:
            sequence.finish()
        except (KeyboardInterrupt, SystemExit, Interrupted):  # the ways in which a signal ends what is not training
            where = f"interrupted after the training of task {sequence.standing.task + 1} of {len(sequence.tasks)}"
            if not checkpoint.list_checkpoints(run_dir):
                raise Interrupted(f"{where}; trainer.checkpoint_every=0 has kept no checkpoint") from None
            raise Interrupted(f"{where}, which is saved; continue with: subspace-lab resume {resume_dir}") from None

    def _result(self, sequence: TaskSequence, wall_seconds: float) -> Outcome:
        from subspace_lab.continual import metrics

        standing, names = sequence.standing, [task.name for task in sequence.tasks]
        found = metrics.figures(standing.matrix, sequence.examples)
        outcome = self._outcome(sequence.trainer, sequence.module, sequence.crew.driver, sequence.data, wall_seconds)
        outcome.metrics = {n: v for n, v in outcome.metrics.items() if not n.startswith(("val/", "task_"))} | found
        outcome.metrics |= {
            "final_error": 1 - found["final_accuracy"],
            "subspace/basis_bytes": float(sequence.method.basis_bytes()),
            "train/seconds": outcome.timing["train_seconds"],
            "task_end/seconds": sum(seconds[1] for seconds in standing.seconds),
        }
        if standing.robust:
            robust = metrics.figures(standing.robust, sequence.examples)
            outcome.metrics |= {f"robust_{name}": value for name, value in robust.items()}
        outcome.objective = "final_error"
        outcome.memory["basis_bytes"] = float(sequence.method.basis_bytes())
        outcome.sections["continual"] = {
            "scenario": sequence.scenario.describe(),
            "head": sequence.scenario.head,
            "part": self.part,
            "schedule": sequence.method.schedule,
            "tasks": names,
            "examples": sequence.examples,
            "accuracy_matrix": standing.matrix,
            **({"robust_accuracy_matrix": standing.robust} if standing.robust else {}),
            "ranks": standing.ranks,
            "dimensions": sequence.method.dimensions(),
            "train_seconds": [seconds[0] for seconds in standing.seconds],
            "task_end_seconds": [seconds[1] for seconds in standing.seconds],
            "definitions": {name: metrics.DEFINITIONS[name] for name in found},
        }
        return outcome
