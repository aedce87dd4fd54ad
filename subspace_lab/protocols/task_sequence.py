"""The state of a continual run: its tasks, the model that goes through them, and where it stands."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from subspace_lab import build
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.objective import Attack, SequenceObjective
from subspace_lab.continual.sharing import gather_tensors, part_of_this_process, share_tensors
from subspace_lab.data.order import mix
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.models.task_heads import find_task_heads, with_task_heads
from subspace_lab.protocols import assembling
from subspace_lab.training import checkpoint as files
from subspace_lab.training import rng
from subspace_lab.training.callbacks.tasks import Standing, TaskProgress
from subspace_lab.training.module import ExperimentModule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from omegaconf import DictConfig

    from subspace_lab.training.trainer import TrainerPlan

_DRAW_BATCH = 256  # examples at a time where statistics are gathered


class TaskSequence:
    """Trains and ends one task after another.

    Args:
        cfg: the validated configuration.
        plan: the resolved trainer group; its length is that of a task.
        method: decides what a task may change.
        scenario: makes the tasks.
        data: what it makes them of, set up.
        run_dir: where checkpoints and rows go.
        label: what progress lines call this run.
        resume_dir: the folder that `subspace-lab resume` would be given.
        part: on which accuracies are measured.

    Attributes:
        tasks: the sequence.
        standing: the tasks behind, and the one at hand.
        examples: of each task in `part`.
    """

    trainer: Trainer
    crew: assembling.Crew

    def __init__(
        self,
        cfg: DictConfig,
        plan: TrainerPlan,
        method: Any,
        scenario: Any,
        data: Any,
        run_dir: Path,
        label: str,
        resume_dir: Path,
        *,
        part: Literal["test", "validation"],
    ) -> None:
        if not isinstance(method, ContinualMethod):
            raise UserError(
                f"method={method.name} does not learn sequences of tasks", hint="method=naive, joint, gpm or coso"
            )
        self.cfg, self.plan, self.method, self.scenario, self.data = cfg, plan, method, scenario, data
        self.run_dir, self.label, self.resume_dir, self.part = run_dir, label, resume_dir, part
        self.leads = plan.rank == 0
        self.tasks = scenario.build(data, cfg.seed)
        self.columns = [task.columns for task in self.tasks]
        self.examples = [len(getattr(task.data.parts, part)) for task in self.tasks]
        self.model_arguments = data.model_arguments()
        if "data_classes" in self.model_arguments:
            self.model_arguments |= {"data_classes": scenario.outputs(data)}
        self.standing = Standing()
        self.objective_attack: Attack | None = None
        self._joint = method.schedule == "joint"
        self._resumes_at: Path | None = None
        self._ends_at: int | None = None
        rng.seed(cfg.seed)
        model = build.build_model_for(cfg, self.model_arguments)
        if scenario.head != "single":
            model = with_task_heads(model, scenario.sizes(data))
        self.objective = SequenceObjective(data.task(), method, self.columns, scenario.head, scenario.loss_over)
        self.objective.joint = self._joint
        self.module = ExperimentModule(
            model,
            self.objective,
            method,
            lambda method, model: build.build_optimizer(cfg, method, model),
            lambda optimizer: build.build_scheduler(cfg, optimizer, self._steps),
            compile_model=plan.compile,
        )
        self.loggers = assembling.make_loggers(cfg, run_dir, method)
        self._steps = 0

    def resume(self, path: Path | None) -> None:
        """Stand where a checkpoint was written; None is the beginning.

        Raises:
            UserError: the checkpoint is of another protocol or another sequence.
        """
        if path is None:
            return
        saved = files.load(path)
        progress = saved.get("callbacks", {}).get("TaskProgress")
        if progress is None:
            raise UserError(f"checkpoint {path} is not of a sequence of tasks", hint="protocol=fit continues it")
        self.standing = Standing(**progress["standing"])
        if self.standing.task >= len(self.tasks):
            raise UserError(
                f"checkpoint {path} stands at task {self.standing.task + 1}, and there are {len(self.tasks)} tasks now",
                hint="scenario.tasks as it was",
            )
        self.method.load_state_dict(progress["method"])
        self._resumes_at = path
        self._ends_at = int(saved["global_step"]) if self.standing.finished else None

    def has_more(self) -> bool:
        """Whether a task is still to be learnt."""
        return len(self.standing.matrix) < (1 if self._joint else len(self.tasks))

    def train(self) -> None:
        """Train the task at hand, or the rest of it."""
        at = self.standing
        data = self.scenario.joined(self.tasks) if self._joint else self.tasks[at.task].data
        # Jointly as well: statistics and messages are of "the last task" then.
        at.task = len(self.tasks) - 1 if self._joint else at.task
        data.configure(self.plan.rank, self.plan.world_size, self.cfg.seed)
        accumulation = self.plan.accumulation(data.batch_size, getattr(data, "global_batch_size", None))
        self._steps = self._length(data, accumulation)
        end = self._ends_at if self._ends_at is not None else at.start_step + self._steps
        self.objective.current = self.objective.judged = at.task
        crew = self._crew(TaskProgress(at, self.method.state_dict, self._prepare))
        plan = copy.copy(self.plan)
        plan.max_steps = end  # 0, which is refused of a user, where nothing is trained by gradients
        self.trainer = plan.create(
            accumulation=accumulation, callbacks=crew.callbacks, loggers=self.loggers, run_dir=self.run_dir
        )
        steps = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = at.start_step  # of the tasks before
        rng.seed(mix(self.cfg.seed, at.task))
        self.trainer.fit(self.module, datamodule=data, ckpt_path=self._resumes_at, weights_only=True)
        self._resumes_at = self._ends_at = None
        self._seconds = self.crew.driver.timing.seconds - sum(seconds[0] for seconds in at.seconds)

    def finish(self) -> None:
        """End the task: let the method take in what it leaves behind, measure all tasks so far, go on to the next."""
        at, device = self.standing, self.trainer.strategy.root_device
        began = time.perf_counter()
        model = self.module.model.to(device)
        self.method.end_task(model, self._context(device))
        ended = time.perf_counter() - began
        row, figures = self._measure(at.task)
        at.matrix.append(row)
        if self.objective_attack is not None:
            self.objective.attack = self.objective_attack
            at.robust.append(self._measure(at.task)[0])
            self.objective.attack = None
        at.ranks.append(self.method.ranks())
        at.seconds.append([self._seconds, ended])
        for logger in self.loggers if self.leads else ():
            logger.log_metrics(figures, step=self.trainer.global_step)
        if self.leads and self.plan.progress != "off":
            print(self._line(row), file=sys.stderr, flush=True)
        at.task, at.start_step, at.finished = at.task + 1, self.trainer.global_step, False

    def log_matrix(self) -> None:
        """Hand the accuracy matrix to the loggers that keep tables."""
        loggers = self.loggers if self.leads else ()
        assembling.log_matrix(loggers, [task.name for task in self.tasks], self.standing.matrix)

    def _length(self, data: Any, accumulation: int) -> int:
        if not self.method.trains:
            return 0
        if self._joint and self.plan.max_epochs is None:  # as many steps as the sequence has together
            return self.plan.max_steps * len(self.tasks)
        return self.plan.steps(data.train_rows, data.batch_size, accumulation)

    def _crew(self, progress: TaskProgress) -> assembling.Crew:
        """Callbacks of their own for every task, which is a fit of its own; the clock goes on."""
        title = f"{self.label} task {self.standing.task + 1}/{len(self.tasks)}"
        title = self.label if self._joint else title
        crew = assembling.crew(self.cfg, self.plan, self.run_dir, title, self.resume_dir, [progress])
        crew.checkpointing.start_step = self.standing.start_step
        if hasattr(self, "crew"):
            crew.driver.timing.load_state_dict(self.crew.driver.timing.state_dict())
            crew.driver.load_state_dict(self.crew.driver.state_dict())
            crew.driver.last_loss = self.crew.driver.last_loss
        self.crew = crew
        return crew

    def _prepare(self, trainer: Trainer) -> None:
        """Have the method decide, unless a checkpoint says what it decided, and act on the model."""
        self.module.configure_model()
        model = self.module.model.to(trainer.strategy.root_device)
        at = self.standing.task
        heads = find_task_heads(model)
        if heads is not None:
            heads.train_only(range(len(self.tasks)) if self._joint else range(at, at + 1))
            if self.scenario.loss_over == "seen":
                heads.train_only(range(at + 1))
        if self._resumes_at is None:
            self.method.begin_task(model, self._context(trainer.strategy.root_device))
        self.method.install(model, at)

    def _context(self, device: torch.device) -> TaskContext:
        task, at = self.tasks[self.standing.task], self.standing.task
        seed = mix(self.cfg.seed, at, 1)

        def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Batch]:
            for batch in task.data.draw(count, batch_size or _DRAW_BATCH, seed, purpose):
                yield {name: tensor.to(device) for name, tensor in batch.items()}

        return TaskContext(
            index=at,
            tasks=len(self.tasks),
            columns=task.columns,
            head=self.scenario.head,
            device=device,
            seed=seed,
            batches=batches,
            forward=self.objective.forward,
            loss=self.objective.task_loss,
            leads=self.leads,
            share=lambda tensors: share_tensors(tensors, device),
            split=part_of_this_process,
            gather=lambda tensors: gather_tensors(tensors, device),
        )

    def _measure(self, index: int) -> tuple[list[float], dict[str, float]]:
        """Accuracies on the tasks 0 … index, and the figures to log."""
        self.module.evaluation.clear()
        row = []
        for judged in range(index + 1):
            self.objective.judged = judged
            self.module.part = f"task_{judged:02d}"
            data = self.tasks[judged].data
            data.configure(self.plan.rank, self.plan.world_size, self.cfg.seed)
            loader = data.test_dataloader() if self.part == "test" else data.val_dataloader()
            with self.method.as_of(self.module.model, judged):
                self.trainer.test(self.module, dataloaders=loader, verbose=False)
            row.append(self.module.evaluation[f"{self.module.part}/accuracy"])
        self.objective.judged = index
        figures = {n: v for n, v in self.module.evaluation.items() if n.endswith("/accuracy")}
        weights = self.examples[: index + 1]
        figures["seen_accuracy"] = sum(a * n for a, n in zip(row, weights, strict=True)) / sum(weights)
        return row, figures

    def _line(self, row: list[float]) -> str:
        accuracies = " ".join(f"{accuracy:.3f}" for accuracy in row)
        ranks = self.standing.ranks[-1]
        dims = self.method.dimensions()
        told = [f"{rank}/{dims[name]}" if name in dims else str(rank) for name, rank in ranks.items()]
        protected = f"; ranks {' '.join(told[:6])}{' …' if len(told) > 6 else ''}" if told else ""
        name = "all tasks" if self._joint else f"after {self.tasks[self.standing.task].name}"
        return f"{self.label}  {name}: accuracies {accuracies}, mean {sum(row) / len(row):.4f}{protected}"
