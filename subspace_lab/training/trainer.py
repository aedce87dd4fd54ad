"""From the `trainer` config group to a Lightning Trainer, with the checks that save a user a queue slot.

Only the standard library is imported here: the configuration is checked against `TrainerPlan`'s signature before torch
exists.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace_lab.errors import UserError
from subspace_lab.training import environment

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

    from subspace_lab.methods.base import Method

Accelerator = Literal["auto", "cpu", "gpu"]
Strategy = Literal["auto", "ddp", "fsdp"]
Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]
Progress = Literal["auto", "bar", "lines", "off"]


@dataclass
class TrainerPlan:
    """How long, on what and how exactly to train; `create` makes the Lightning Trainer.

    Args:
        accelerator: auto takes a CUDA GPU if there is one.
        devices: processes (GPUs, or CPU processes with strategy=ddp) per machine; auto is every GPU, or one process.
        num_nodes: machines.
        strategy: auto is one process, or ddp for several; fsdp shards weights, gradients and
            optimizer state, for methods whose constraint does not need whole matrices.
        precision: 32-true, bf16-true (weights, gradients and moments in bf16: GaLore's setting), bf16-mixed, 16-mixed.
        max_steps: optimizer steps.
        max_epochs: passes over the training data instead; when set, max_steps follows from it (rounded up).
        val_every: optimizer steps between validations; one always follows the last step. null: none in between.
        val_batches: batches of a validation per process; null is all of them.
        checkpoint_every: optimizer steps between checkpoints; one always follows the last step. 0 keeps none.
        keep_checkpoints: how many checkpoints stay on the disk.
        gradient_clip_val: largest norm of the full gradient; null or 0 does not clip.
        accumulate_grad_batches: micro-batches per step; null derives it from data.global_batch_size.
        compile: run the model through torch.compile.
        log_every: optimizer steps between rows of metrics.csv.
        deterministic: only deterministic kernels (slower on a GPU).
        progress: bar, lines (one line every few log rows) or off; auto is a bar on a terminal and lines elsewhere.
    """

    accelerator: Accelerator = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    strategy: Strategy = "auto"
    precision: Precision = "32-true"
    max_steps: int = 1000
    max_epochs: int | None = None
    val_every: int | None = 100
    val_batches: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int | None = None
    compile: bool = False
    log_every: int = 10
    deterministic: bool = False
    progress: Progress = "auto"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "max_steps", "keep_checkpoints", "log_every"):
            _at_least_one(name, getattr(self, name))
        for name in ("val_every", "val_batches", "accumulate_grad_batches", "max_epochs"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.devices != "auto":
            _at_least_one("devices", self.devices)
        if self.checkpoint_every < 0:
            raise UserError(
                f"trainer.checkpoint_every is {self.checkpoint_every}; it must be positive, or 0 for no checkpoints"
            )
        if self.gradient_clip_val is not None and self.gradient_clip_val < 0:
            raise UserError(
                f"trainer.gradient_clip_val is {self.gradient_clip_val}; it must be positive, or null for none"
            )

    def resolve(self) -> TrainerPlan:
        """Settle `auto` values on this machine and check that it can do what was asked; changes and returns self.

        Raises:
            UserError: no GPU, too few GPUs, a precision or strategy this machine cannot do.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.accelerator == "auto":
            self.accelerator = "gpu" if gpus else "cpu"
        if self.accelerator == "gpu" and not gpus:
            raise UserError(
                "trainer.accelerator=gpu, but torch sees no CUDA GPU here",
                hint="use trainer=cpu, or run `subspace-lab doctor` to see why",
            )
        devices = self.devices if self.devices != "auto" else max(gpus, 1) if self.accelerator == "gpu" else 1
        self.devices = devices
        if self.accelerator == "gpu" and devices > gpus:
            raise UserError(f"trainer.devices={self.devices}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
        if self.strategy == "auto" and self.world_size > 1:
            self.strategy = "ddp"
        if self.accelerator == "cpu" and self.precision == "16-mixed":
            raise UserError("trainer.precision=16-mixed needs a GPU", hint="use bf16-mixed or 32-true on a CPU")
        if self.accelerator == "gpu" and self.precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
            what = f"trainer.precision={self.precision}, but {torch.cuda.get_device_name()} has no bf16"
            raise UserError(what, hint="use trainer.precision=32-true")
        return self

    @property
    def world_size(self) -> int:
        """Processes of the run, once resolved."""
        return (self.devices if isinstance(self.devices, int) else 1) * self.num_nodes

    @property
    def rank(self) -> int:
        """This process's rank."""
        return environment.global_rank(self.devices if isinstance(self.devices, int) else 1)

    def accumulation(self, batch_size: int, global_batch_size: int | None) -> int:
        """Return how many micro-batches make one optimizer step.

        Args:
            batch_size: rows per process and micro-batch.
            global_batch_size: rows per optimizer step over all processes; None is one micro-batch per process.

        Raises:
            UserError: the global batch is not a whole number of micro-batches.
        """
        if self.accumulate_grad_batches is not None:
            return self.accumulate_grad_batches
        if global_batch_size is None:
            return 1
        rows = batch_size * self.world_size
        if global_batch_size % rows:
            fits = [size for size in range(1, batch_size + 1) if global_batch_size % (size * self.world_size) == 0]
            hint = f"data.batch_size={fits[-1]} fits" if fits else f"make it a multiple of {self.world_size}"
            raise UserError(
                f"data.global_batch_size={global_batch_size} is not a multiple of data.batch_size={batch_size} × "
                f"{self.world_size} process{'es' if self.world_size > 1 else ''}",
                hint=hint,
            )
        return global_batch_size // rows

    def settle_length(self, train_rows: int | None, batch_size: int, accumulation: int) -> None:
        """Let `max_epochs`, if set, decide `max_steps`.

        Args:
            train_rows: rows or examples of one pass over the training data; None if nobody knows (streamed text).
            batch_size: of them per process and micro-batch.
            accumulation: micro-batches per step.

        Raises:
            UserError: the length of a pass is not known.
        """
        if self.max_epochs is not None:
            self.max_steps = self.steps(train_rows, batch_size, accumulation)

    def steps(self, train_rows: int | None, batch_size: int, accumulation: int) -> int:
        """Return how many optimizer steps training on these data takes; see `settle_length`."""
        if self.max_epochs is None:
            return self.max_steps
        if train_rows is None:
            raise UserError(
                f"trainer.max_epochs={self.max_epochs}, but streamed text has no known length",
                hint="set trainer.max_steps and leave trainer.max_epochs=null",
            )
        return -(-self.max_epochs * train_rows // (batch_size * self.world_size * accumulation))

    def check_method(self, method: Method, accumulation: int) -> None:
        """Refuse, in one line, what this method cannot do together with these settings.

        Raises:
            UserError: see the messages.
        """
        if self.strategy == "fsdp" and (method.per_layer or not method.shards):
            what = f"method={method.name} cannot run under FSDP, which cuts the matrices it needs"
            raise UserError(what, hint="use trainer=ddp")
        if method.passes_per_step > 1:
            what = f"method={method.name} makes {method.passes_per_step} passes per step"
            if accumulation > 1:
                raise UserError(f"{what} and cannot accumulate gradients", hint="set data.global_batch_size=null")
            if self.precision == "16-mixed":
                raise UserError(
                    f"{what}, which 16-mixed precision does not allow",
                    hint="use trainer.precision=bf16-mixed",
                )
        if getattr(method, "per_layer", False):
            what = "method.per_layer updates each weight during the backward pass and cannot be combined with"
            if accumulation > 1:
                raise UserError(f"{what} {accumulation} micro-batches per step", hint="set data.global_batch_size=null")
            if self.gradient_clip_val:
                raise UserError(
                    f"{what} gradient clipping by the global norm", hint="set trainer.gradient_clip_val=null"
                )
            if self.precision == "16-mixed":
                raise UserError(f"{what} 16-mixed precision", hint="use trainer.precision=bf16-true")
            if self.world_size > 1:
                raise UserError(f"{what} several processes", hint="use trainer.devices=1 or method.per_layer=false")

    def create(
        self, *, accumulation: int, callbacks: Sequence[Callback], loggers: Sequence[Logger], run_dir: Path
    ) -> Trainer:
        """Return the Trainer; call `resolve` first.

        Args:
            accumulation: micro-batches per optimizer step.
            callbacks: in the order in which their hooks run.
            loggers: where the rows go.
            run_dir: the run folder.
        """
        environment.quiet_lightning()
        import torch
        from lightning.pytorch import Trainer

        if not torch.cuda.is_available():
            # Lightning has torch look for NVIDIA's driver library in a way that opens files, and torch's optimizers ask
            # at every step.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

        from subspace_lab.training.checkpoint import AtomicCheckpointIO
        from subspace_lab.training.profiler import NoProfiler
        from subspace_lab.training.sharding import strategy_of

        plugins: list[Any] = [AtomicCheckpointIO(self.keep_checkpoints)]
        slurm = environment.slurm_plugin()
        if slurm is not None:
            plugins.append(slurm)
        return Trainer(
            accelerator="cuda" if self.accelerator == "gpu" else "cpu",
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=strategy_of(self.strategy, gpu=self.accelerator == "gpu", processes=self.world_size),
            precision=self.precision,
            max_steps=self.max_steps,
            max_epochs=-1,
            # Never in between: a fit is one endless epoch, whose end does not come.
            val_check_interval=None if self.val_every is None else self.val_every * accumulation,
            check_val_every_n_epoch=None if self.val_every else 1,
            limit_val_batches=1.0 if self.val_batches is None else self.val_batches,
            num_sanity_val_steps=0,
            accumulate_grad_batches=accumulation,
            gradient_clip_val=self.gradient_clip_val or None,
            deterministic=self.deterministic or None,
            logger=list(loggers),
            callbacks=list(callbacks),
            plugins=plugins,
            profiler=NoProfiler(),
            default_root_dir=str(run_dir),
            # Ours: checkpoints, progress and metrics know about optimizer steps and exact resumption.
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # The data modules divide the data between processes themselves, and know their position in it.
            use_distributed_sampler=False,
            # Validation inside and after training must be the same computation.
            inference_mode=False,
        )

    def wants_bar(self) -> bool:
        """Return whether to draw a progress bar."""
        return self.progress == "bar" or (self.progress == "auto" and sys.stderr.isatty())


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"trainer.{name} is {value}; it must be a whole number of at least 1")
