"""`estimate=true`: how much memory a run would need, without data, weights or a GPU.

The model is built from shapes only (torch's fake tensors). The optimizer's state is what one real step of it leaves
behind; activations are the tensors that a forward pass saves for the backward pass, each storage counted once and
weights left out. With several processes: what each holds, and what it sends (see `estimate_processes`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab import build
from subspace_lab.errors import UserError
from subspace_lab.protocols.estimate_processes import fake_group, processes, share_of
from subspace_lab.reporting.tables import write_bytes

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from torch import nn

    from subspace_lab.build import DataModule
    from subspace_lab.methods.base import Method
    from subspace_lab.training.trainer import TrainerPlan

# The published runs' tokenizers (T5's, LLaMA's) have 32000 pieces: taken when the tokenizer is not on this machine.
USUAL_VOCABULARY = 32000
ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("state", "optimizer state"),
    ("activations", "activations"),
    ("gathered", "gathered weights"),
    ("total", "total"),
    ("sent", "sent per step"),
    ("sent_refresh", "more per refresh"),
)


@dataclass
class Memory:
    """Bytes per device of one configuration.

    Attributes:
        weights: parameters in their training precision.
        gradients: alive together at the end of the backward pass (per-layer updates: the largest one).
        state: the optimizer's tensors, bases included.
        activations: saved for the backward pass of one micro-batch.
        parameters: number of them.
        processes: number of them.
        strategy: how they share the work.
        gathered: whole weights that FSDP2 has together at a time.
        sent: bytes that a process sends for one micro-batch and one step.
        sent_refresh: bytes more when all bases are refreshed.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    parameters: int
    processes: int = 1
    strategy: str = "auto"
    gathered: int = 0
    sent: float = 0.0
    sent_refresh: float = 0.0

    @property
    def total(self) -> int:
        """Everything together; kernels' work space and fragmentation come on top."""
        return self.weights + self.gradients + self.state + self.activations + self.gathered


def print_estimate(runs: Sequence[tuple[str, DictConfig]]) -> None:
    """Print the memory table of some configurations side by side.

    Args:
        runs: (column title, configuration), the run itself first.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    notes: list[str] = []
    columns = [(label, estimate(cfg, notes)) for label, cfg in runs]
    cfg, first = runs[0][1], columns[0][1]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for label, _ in columns:
        table.add_column(label, justify="right")
    for row, label in ROWS:
        if any(getattr(memory, row) for _, memory in columns):
            table.add_row(label, *(write_bytes(getattr(memory, row)) for _, memory in columns))
    console = Console()
    console.print(f"memory per device: {first.parameters / 1e6:,.1f} M parameters, {cfg.trainer.precision}, ", end="")
    several = f", {first.processes} processes, {first.strategy}" if first.processes > 1 else ""
    console.print(f"micro-batches of {build.build_data(cfg).blank_batch()[1]}{several}")
    console.print(table)
    for line in dict.fromkeys(notes):
        console.print(line)


def estimate(cfg: DictConfig, notes: list[str]) -> Memory:
    """Return the memory of one configuration; what had to be assumed is appended to `notes`."""
    import torch

    plan: TrainerPlan = build.instantiate(cfg.trainer)
    method = build.build_method(cfg)
    data = build.build_data(cfg)
    if hasattr(data, "pretraining"):
        raise UserError(
            "estimate=true tells what training takes, and protocol=merge merges what is trained",
            hint="merging checkpoints holds at most (models + 2) × the largest tensor",
        )
    known = {"data_vocab_size": _vocabulary(cfg, data, notes)} if "block_size" in cfg.data else data.model_arguments()
    scenario = build.instantiate(cfg.scenario) if cfg.get("scenario") is not None else None
    if scenario is not None and "data_classes" in known:
        known = known | {"data_classes": scenario.outputs(data)}
    half = torch.float16 if plan.precision == "16-mixed" else torch.bfloat16
    size = processes(plan, notes)
    if size > 1:
        plan.strategy = "ddp" if plan.strategy == "auto" else plan.strategy
        plan.check_method(method, 1)
    with fake_group(size) if size > 1 else nullcontext(), _fake():
        with _default_dtype(torch.float32 if plan.precision == "32-true" else half):
            model = method.prepare(build.build_model_for(cfg, known))
            activations = _saved_bytes(model, data)
        if plan.precision.endswith("mixed"):
            # Mixed precision computes in 16 bits but keeps weights, gradients and state in 32.
            model = method.prepare(build.build_model_for(cfg, known))
        if size > 1:
            parameters = sum(p.numel() for p in model.parameters())
            share = share_of(cfg, plan, method, model, data, size)
            return Memory(
                **vars(share), activations=activations, parameters=parameters, processes=size, strategy=plan.strategy
            )
        sizes = [p.numel() * p.element_size() for p in model.parameters()]
        return Memory(
            weights=sum(sizes),
            gradients=max(sizes) if method.per_layer else sum(sizes),
            state=_state_bytes(cfg, method, model),
            activations=activations,
            parameters=sum(p.numel() for p in model.parameters()),
        )


def _vocabulary(cfg: DictConfig, data: Any, notes: list[str]) -> int:
    if cfg.model.get("vocab_size") is not None:
        return int(cfg.model.vocab_size)
    tokenizer = str(cfg.data.get("tokenizer", ""))
    if tokenizer == "bytes" or Path(tokenizer).exists():
        return int(data.vocab_size)
    notes.append(
        f"the tokenizer {tokenizer} is not looked up: a vocabulary of {USUAL_VOCABULARY} (set model.vocab_size)"
    )
    return USUAL_VOCABULARY


@contextmanager
def _fake() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    gc.collect()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _saved_bytes(model: nn.Module, data: DataModule) -> int:
    import torch

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}  # the storages themselves too: a freed one's address may come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    batch, _ = data.blank_batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = data.task().loss(model, batch)
    total = sum(int(storage.nbytes()) for storage in kept.values())
    del loss
    return total


def _state_bytes(cfg: DictConfig, method: Method, model: nn.Module) -> int:
    import torch

    from subspace_lab.protocols.fit import state_bytes

    method.per_layer = False  # the state is the same, and a step can be called
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = build.build_optimizer(cfg, method, model)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"optimizer={type(optimizer).__name__} cannot be estimated: {str(error).splitlines()[0]}"
        ) from error
    return state_bytes(optimizer)
