"""One training run: build the parts, train (or continue), validate, export."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab import build
from subspace_lab.errors import UserError
from subspace_lab.methods.base import Origin
from subspace_lab.protocols import assembling
from subspace_lab.protocols.outcome import Outcome
from subspace_lab.schema import to_plain
from subspace_lab.training import environment

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from omegaconf import DictConfig
    from torch import nn
    from torch.optim import Optimizer

    from subspace_lab.build import DataModule
    from subspace_lab.methods.base import Method
    from subspace_lab.training.callbacks.checkpointing import Checkpointing
    from subspace_lab.training.callbacks.method import MethodDriver
    from subspace_lab.training.module import ExperimentModule
    from subspace_lab.training.trainer import TrainerPlan

EXPORT_FOLDER = "export"


class Fit:
    """Trains one model with one method on one data set.

    Args:
        train_accuracy: measure the trained model on its whole training set too (train/accuracy and train/loss).
    """

    def __init__(self, train_accuracy: bool = False) -> None:
        self.train_accuracy = train_accuracy

    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Train, or continue from a checkpoint where `cfg.resume` asks for it, and return the figures.

        Args:
            cfg: the validated configuration.
            run_dir: where checkpoints, rows and the export go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given (of the main run, for a baseline).

        Raises:
            UserError: parts that do not fit together, a full disk, no usable checkpoint at the path given.
            Interrupted: a signal asked to stop; everything is saved.
        """
        began = time.perf_counter()
        environment.quiet_lightning()
        plan = assembling.build_plan(cfg)
        method = build.build_method(cfg)
        if cfg.get("scenario") is not None:
            raise UserError(
                "these data are a sequence of tasks (scenario), and this protocol learns one task",
                hint="protocol=continual with method=naive, gpm, coso …, or ordinary data",
            )
        data = self._build_data(cfg)
        accumulation = plan.accumulation(data.batch_size, getattr(data, "global_batch_size", None))
        plan.check_method(method, accumulation)
        data.configure(plan.rank, plan.world_size, cfg.seed)
        data.prepare_data()
        data.setup("fit")
        plan.settle_length(data.train_rows, data.batch_size, accumulation)
        self._prepare(cfg, plan, data)

        module, trainer, driver, checkpointing = self._assemble(
            cfg, plan, method, data, accumulation, run_dir, label, resume_dir
        )
        checkpoint = find_checkpoint(cfg.resume, run_dir)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if "Early stopping conditioned on metric" not in str(error):
                raise
            raise UserError(str(error).split(". Pass in", 1)[0], hint="monitor=val/loss or val/perplexity") from error
        except SystemExit:  # Lightning's way to end on a second Ctrl-C, with an exit code of its own
            raise KeyboardInterrupt from None
        if checkpointing.validated_at != trainer.global_step or not module.validation:
            trainer.validate(module, datamodule=data, verbose=False)
        self._evaluate(trainer, module, data)
        assembling.close_loggers(trainer.loggers)
        if cfg.export and (trainer.is_global_zero or plan.strategy == "fsdp"):
            export(module.model, method, run_dir / EXPORT_FOLDER, writes=trainer.is_global_zero)
        if trainer.is_global_zero:
            method.save(module.model, run_dir, Origin(cfg.seed, to_plain(cfg.model), data.model_arguments()))
        return self._outcome(trainer, module, driver, data, time.perf_counter() - began)

    def _build_data(self, cfg: DictConfig) -> DataModule:
        data = build.build_data(cfg)
        if hasattr(data, "pretraining"):
            raise UserError(
                "protocol=fit trains on a data set, and the data are several tasks whose experts are to be merged",
                hint="method=task_arithmetic, ties, iso_c …, or data=digits",
            )
        if not hasattr(data, "train_dataloader"):
            raise UserError(
                "protocol=fit trains on a data set, and the data are an environment",
                hint="protocol=dqn, protocol=evolution, or protocol@protocol.cell=dqn in a dimension search",
            )
        return data

    def _build_model(self, cfg: DictConfig, data: DataModule) -> nn.Module:
        return build.build_model(cfg, data)

    def _prepare(self, cfg: DictConfig, plan: TrainerPlan, data: DataModule) -> None:
        """Get ready what is needed after training, so that it is missed before."""

    def _evaluate(self, trainer: Trainer, module: ExperimentModule, data: DataModule) -> None:
        """Measure the trained model on the test part, and on the training part if that was asked for."""
        if self.train_accuracy:
            module.part = "train"
            trainer.test(module, dataloaders=data.train_eval_dataloader(), verbose=False)
        if data.has_test:
            module.part = "test"
            trainer.test(module, dataloaders=data.test_dataloader(), verbose=False)
        for logger in trainer.loggers if module.evaluation and trainer.is_global_zero else ():
            logger.log_metrics(module.evaluation, step=trainer.global_step)

    def _assemble(
        self,
        cfg: DictConfig,
        plan: TrainerPlan,
        method: Method,
        data: DataModule,
        accumulation: int,
        run_dir: Path,
        label: str,
        resume_dir: Path,
    ) -> tuple[ExperimentModule, Trainer, MethodDriver, Checkpointing]:
        from subspace_lab.training import rng
        from subspace_lab.training.module import ExperimentModule

        rng.seed(cfg.seed)
        model = self._build_model(cfg, data)
        module = ExperimentModule(
            model,
            data.task(),
            method,
            lambda method, model: build.build_optimizer(cfg, method, model),
            lambda optimizer: build.build_scheduler(cfg, optimizer, plan.max_steps),
            compile_model=plan.compile,
        )
        crew = assembling.crew(cfg, plan, run_dir, label, resume_dir)
        loggers = assembling.make_loggers(cfg, run_dir, method)
        trainer = plan.create(accumulation=accumulation, callbacks=crew.callbacks, loggers=loggers, run_dir=run_dir)
        return module, trainer, crew.driver, crew.checkpointing

    def _outcome(
        self, trainer: Trainer, module: ExperimentModule, driver: MethodDriver, data: Any, wall_seconds: float
    ) -> Outcome:
        from subspace_lab.training.callbacks.timing import peak_memory_bytes

        timing, optimizer, unit = driver.timing, trainer.optimizers[0], module.task.unit
        parameters = list(module.model.parameters())
        metrics = {
            **module.validation,
            f"train/{unit}_per_second": timing.units_per_second,
            "optimizer/state_bytes": float(state_bytes(optimizer)),
            "model/parameters": float(sum(p.numel() for p in parameters)),
            **driver.figures(optimizer),
            **{f"subspace/{k}": float(v) for k, v in module.method.metrics().items() if k in ("d", "D", "k", "n")},
        }
        if driver.last_loss is not None:
            metrics["train/loss"] = driver.last_loss
        metrics |= module.evaluation  # the loss on all of the training set, where that was asked for
        return Outcome(
            metrics=metrics,
            timing={
                "steps": trainer.global_step,
                unit: timing.units,
                "train_seconds": timing.seconds,
                "validation_seconds": timing.validation_seconds,
                "wall_seconds": wall_seconds,
                f"{unit}_per_second": timing.units_per_second,
            },
            memory={
                "peak_bytes": peak_memory_bytes(trainer.strategy.root_device),
                "optimizer_state_bytes": state_bytes(optimizer),
                "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            },
            data=data.describe(),
        )


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """Return the checkpoint to continue from, None to start anew.

    Args:
        resume: null; auto: the newest intact checkpoint of `run_dir`, if any; a run folder; a .ckpt file.
        run_dir: this run's folder.

    Raises:
        UserError: a folder without a usable checkpoint was named, or a damaged file.
    """
    from subspace_lab.training import checkpoint as files

    def tell(line: str) -> None:
        if environment.is_main_process():
            print(line, file=sys.stderr)

    if resume is None:
        return None
    if resume != "auto" and Path(resume).is_file():
        problem = files.damage(Path(resume))
        if problem is not None:
            raise UserError(f"checkpoint {resume} is damaged: {problem}")
        return Path(resume)
    folder = run_dir if resume == "auto" else Path(resume)
    if not folder.is_dir() and resume != "auto":
        raise UserError(f"resume={resume}: no such run folder or checkpoint")
    found = files.newest_intact(folder, tell)
    if found is None and resume != "auto" and (damaged := files.list_checkpoints(folder)):
        raise UserError(
            f"no checkpoint of {folder} can be read: all {len(damaged)} are damaged",
            hint="give the first command again, without resume, to start anew in another folder",
        )
    if found is None and folder.resolve() != run_dir.resolve():
        within = sorted({path.parent.parent for path in folder.glob(f"*/{files.FOLDER}/*.ckpt")})
        raise UserError(f"no checkpoint in {folder}", hint=f"did you mean {within[-1]}?" if within else None)
    if found is None:
        tell(f"no usable checkpoint in {folder}: starting from step 0")
    else:
        tell(f"continuing from step {files.step_of(found)} ({found})")
    return found


def export(model: nn.Module, method: Method, folder: Path, *, writes: bool = True) -> None:
    """Write plain weights that the rest of the world loads: a transformers folder, else one safetensors file.

    Args:
        model: the trained model; of sharded weights all processes must bring theirs.
        method: says what the plain weights are.
        folder: where to write.
        writes: whether this process does.
    """
    from subspace_lab.optim.shards import whole

    weights = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in method.export(model).items()}
    if not writes:
        return
    save = getattr(model, "save_pretrained", None)
    if save is not None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        save(folder, state_dict=weights)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors an optimizer keeps between steps."""
    own = getattr(optimizer, "state_bytes", None)
    if own is not None:
        return int(own())
    from subspace_lab.optim.shards import local

    tensors = [
        value for state in optimizer.state.values() for value in state.values() if hasattr(value, "element_size")
    ]
    return sum(t.numel() * t.element_size() for t in map(local, tensors))
