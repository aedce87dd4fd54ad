"""`protocol=dqn` and `protocol=evolution`: learn a policy in a gymnasium environment, and measure its mean return.

The policy with the best mean return over the validation episodes is kept and measured on the test episodes. Both sets
of episodes start from the same states in every run; training episodes never do.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab import build, interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols import assembling
from subspace_lab.protocols.fit import EXPORT_FOLDER, export, find_checkpoint, state_bytes
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.rl.environments import Environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.rl.learner import Learner, Parts
    from subspace_lab.training.trainer import TrainerPlan


@dataclass
class Best:
    """The policy to keep.

    Attributes:
        value: its mean validation return.
        step: optimizer steps after which it was found.
        weights: the state dict of the model that is trained.
    """

    value: float = float("-inf")
    step: int = -1
    weights: dict[str, Any] = field(default_factory=dict)


class Reinforcement:
    """Learns one policy with one method in one environment.

    Args:
        learner: how; a partial of a class of subspace_lab.rl.
        validation_episodes: played every trainer.val_every steps; chooses the policy that is kept.
        test_episodes: played once, with that policy.
    """

    def __init__(
        self, learner: Callable[..., Learner], validation_episodes: int = 20, test_episodes: int = 100
    ) -> None:
        for name, episodes in (("validation_episodes", validation_episodes), ("test_episodes", test_episodes)):
            if episodes < 1:
                raise UserError(f"protocol.{name}={episodes}: expected at least 1")
        self.learner = learner
        self.validation_episodes, self.test_episodes = validation_episodes, test_episodes

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Learn, or continue from a checkpoint where `cfg.resume` asks for it, and return the figures.

        Args:
            cfg: the validated configuration.
            run_dir: where checkpoints, rows and the export go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given.

        Raises:
            UserError: parts that do not fit together, a missing package, a full disk, no usable checkpoint.
            Interrupted: a signal asked to stop; everything is saved.
        """
        began = time.perf_counter()
        plan: TrainerPlan = build.instantiate(cfg.trainer).resolve()
        parts = _parts(cfg, plan)
        run = _Run(self, cfg, plan, parts, self.learner(parts), run_dir, label)
        checkpoint = find_checkpoint(cfg.resume, run_dir)
        if checkpoint is not None:
            run.load(checkpoint)
        interrupt.request.armed = True
        try:
            run.train(resume_dir)
        finally:
            interrupt.request.armed = False
            assembling.close_loggers(run.loggers)
        return run.finish(began)


class _Run:
    """The state of one run between two pieces of learning."""

    def __init__(
        self,
        protocol: Reinforcement,
        cfg: DictConfig,
        plan: TrainerPlan,
        parts: Parts,
        learner: Learner,
        run_dir: Path,
        label: str,
    ) -> None:
        from subspace_lab.training.checkpoint import AtomicCheckpointIO

        self.protocol, self.cfg, self.plan, self.parts, self.learner = protocol, cfg, plan, parts, learner
        self.run_dir, self.label = run_dir, label
        self.files = AtomicCheckpointIO(plan.keep_checkpoints)
        self.best, self.figures = Best(), dict[str, float]()
        self.cpu_seconds = 0.0
        self.saved_at = -1
        self.loggers = assembling.make_loggers(cfg, run_dir, parts.method)

    def train(self, resume_dir: Path) -> None:
        """Learn piece by piece to the last step, or until nothing better is possible."""
        plan, learner = self.plan, self.learner
        best_return = self.parts.environment.best_return
        while learner.step < plan.max_steps and not (best_return is not None and self.best.value >= best_return):
            before, clock = learner.step, time.thread_time()
            self.figures = learner.advance(plan.max_steps)
            last = learner.step >= plan.max_steps

            def due(every: int, before: int = before, last: bool = last) -> bool:
                return every > 0 and (learner.step // every > before // every or last)

            if due(plan.log_every):
                self._log(self.figures | {"train/frames": float(learner.frames)})
            if plan.val_every is not None and due(plan.val_every):
                self._validate()
            self.cpu_seconds += time.thread_time() - clock
            asked = interrupt.requested() is not None
            if asked or due(plan.checkpoint_every):
                self.save()
            if asked:
                raise Interrupted(
                    f"interrupted after step {learner.step} of {plan.max_steps}, everything is saved; "
                    f"continue with: subspace-lab resume {resume_dir}"
                )

    def _validate(self) -> None:
        parts, step = self.parts, self.learner.step
        value = parts.environment.evaluate(parts.plain_policy(), self.protocol.validation_episodes, "val")
        self._log({"val/return": value})
        if value > self.best.value:
            self.best = Best(value, step, copy.deepcopy(parts.model.state_dict()))
        if self.plan.progress != "off":
            trained = self.figures.get("train/return", float("nan"))
            line = (
                f"{self.label}  step {step}/{self.plan.max_steps}  train return {trained:.1f}  val return {value:.1f}"
            )
            print(line, file=sys.stderr, flush=True)

    def _log(self, row: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(row, step=self.learner.step)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: the disk is full or read-only.
        """
        from subspace_lab.training import checkpoint as files

        for logger in self.loggers:
            logger.save()
        parts, best = self.parts, self.best
        contents = {
            "learner": self.learner.state_dict(),
            "model": parts.model.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict(),
            "best": {"value": best.value, "step": best.step, "weights": best.weights},
            "figures": self.figures,
            "cpu_seconds": self.cpu_seconds,
        }
        self.files.save_checkpoint(contents, files.path_for(self.run_dir, self.learner.step))
        if self.files.problem is not None:
            raise UserError(self.files.problem, hint="free some space, then continue with `subspace-lab resume`")

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; rows of steps that will be done again are dropped."""
        contents = self.files.load_checkpoint(path)
        parts = self.parts
        parts.model.load_state_dict(contents["model"])
        parts.optimizer.load_state_dict(contents["optimizer"])
        parts.scheduler.load_state_dict(contents["scheduler"])
        self.learner.load_state_dict(contents["learner"])
        self.best = Best(**contents["best"])
        self.figures, self.cpu_seconds = contents["figures"], float(contents["cpu_seconds"])
        for logger in self.loggers:
            if hasattr(logger, "drop_rows_after"):
                logger.drop_rows_after(self.learner.step)

    def finish(self, began: float) -> Outcome:
        """Test the best policy, write it, and return the figures."""
        parts, learner = self.parts, self.learner
        if self.best.weights:
            parts.model.load_state_dict(self.best.weights)
        policy = parts.plain_policy()
        if self.cfg.export:
            export(parts.model, parts.method, self.run_dir / EXPORT_FOLDER)
        test = parts.environment.evaluate(policy, self.protocol.test_episodes, "test")
        metrics = {
            **self.figures,
            "val/return": self.best.value,
            "val/negative_return": -self.best.value,
            "test/return": test,
            "optimizer/state_bytes": float(state_bytes(parts.optimizer)),
            "model/parameters": float(sum(p.numel() for p in policy.parameters())),
            **{f"subspace/{name.removeprefix('subspace/')}": float(v) for name, v in parts.method.metrics().items()},
        }
        return Outcome(
            metrics=metrics,
            timing={
                "steps": learner.step,
                "best_step": self.best.step,
                "frames": learner.frames,
                "cpu_seconds": self.cpu_seconds,
                "wall_seconds": time.perf_counter() - began,
            },
            memory={"optimizer_state_bytes": state_bytes(parts.optimizer)},
            data=parts.environment.describe(),
            objective="val/negative_return",
        )


def _parts(cfg: DictConfig, plan: TrainerPlan) -> Parts:
    import torch

    from subspace_lab.rl.learner import Parts, plain_copy
    from subspace_lab.training import rng

    method = build.build_method(cfg)
    plan.check_method(method, accumulation=1)
    if plan.world_size > 1:
        raise UserError("reinforcement learning runs in one process", hint="use trainer.devices=1")
    if method.passes_per_step > 1 or method.per_layer:
        raise UserError(f"method={method.name} steps inside a backward pass, which this protocol does not make")
    environment: Any = build.build_data(cfg)
    if not isinstance(environment, Environment):
        raise UserError("this protocol learns in an environment", hint="write data=cartpole or data=inverted_pendulum")
    rng.seed(cfg.seed)
    policy = build.build_model(cfg, environment)  # type: ignore[arg-type]
    policy.to(torch.device("cuda" if plan.accelerator == "gpu" else "cpu"))
    plain = plain_copy(policy)
    model = method.prepare(policy).eval()
    optimizer = build.build_optimizer(cfg, method, model)
    optimizer.register_step_post_hook(lambda stepped, args, kwargs: method.after_step(stepped))
    scheduler = build.build_scheduler(cfg, optimizer, plan.max_steps)
    return Parts(model, plain, method, optimizer, scheduler, environment, seed=cfg.seed, clip=plan.gradient_clip_val)
