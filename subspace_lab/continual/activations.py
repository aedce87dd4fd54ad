"""What enters the layers of a model, streamed: sums of outer products or sketches, never the activations themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.linalg.frequent_directions import FrequentDirections
from subspace_lab.linalg.precision import matmul
from subspace_lab.models.task_heads import TaskHeads

Forward = Callable[[nn.Module, Batch], Any]
Layers = dict[str, nn.Module]

LARGEST_GRAM = 8192  # 0.5 GB in float64
SKETCH_ROWS = 1024
_CHUNK_ENTRIES = 1 << 24  # of unfolded patches at a time


def protected_layers(model: nn.Module, targets: Sequence[str] | None = None) -> Layers:
    """Linear and 2-d convolution layers whose inputs can be protected, by path, in module order.

    Left out: `TaskHeads` (each belongs to its own task), layers inside `nn.MultiheadAttention` (which never calls
    them), and layers whose weight something else uses too (tied embeddings).

    Args:
        model: any module.
        targets: regular expressions searched in the paths; None takes all.

    Raises:
        UserError: nothing matches, or a grouped convolution does.
    """
    uses: dict[int, int] = {}
    closed: set[int] = set()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[id(p)] = uses.get(id(p), 0) + 1
        if isinstance(module, TaskHeads | nn.MultiheadAttention):
            closed |= {id(inner) for inner in module.modules()}
    candidates = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in closed and uses[id(module.weight)] == 1
    }
    chosen: Layers = {
        path: layer
        for path, layer in candidates.items()
        if targets is None or any(re.search(pattern, path) for pattern in targets)
    }
    if not chosen:
        names = list(candidates)
        raise UserError(
            f"method.targets={list(targets or ())} matches no layer of the model, whose layers are {names[:4]} …",
            hint=did_you_mean(str((targets or [""])[0]), names) or "null takes all",
        )
    for path, layer in chosen.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise UserError(
                f"layer {path} is a convolution in {layer.groups} groups, whose inputs have no common basis",
                hint="method.targets without it: it is then frozen after the first task",
            )
    return chosen


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of a layer as rows (n, d), in chunks: one per position, or one per patch of a convolution.

    Patches are in the order of ``weight.flatten(1)``: channels, then kernel rows and columns.  Padding of any mode,
    stride and dilation are the layer's.
    """
    if not isinstance(layer, nn.Conv2d):
        yield x.reshape(-1, x.shape[-1])
        return
    x = x if x.dim() == 4 else x.unsqueeze(0)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    d = x.shape[1] * layer.kernel_size[0] * layer.kernel_size[1]
    positions = (x.shape[2] * x.shape[3]) // (layer.stride[0] * layer.stride[1]) + 1
    size = max(1, _CHUNK_ENTRIES // (d * positions))
    for part in torch.split(x, size):
        patches = functional.unfold(part, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        yield patches.mT.reshape(-1, d)


def input_size(layer: nn.Module) -> int:
    """d, the length of one input row."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no update of running statistics, no graph; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def stream_inputs(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Batch],
    forward: Forward,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Run batches through the model in evaluation mode and show each layer's input rows to `visit(path, rows)`.

    Evaluation mode is what the released GPM gathers in.

    Raises:
        UserError: a layer was never called.
    """
    seen: set[str] = set()

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.add(path)
            for rows in input_rows(layer, arguments[0].detach()):
                visit(path, rows.float() if rows.dtype != torch.float64 else rows)

        return watch

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        with _evaluating(model):
            for batch in batches:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unused = [path for path in layers if path not in seen]
    if unused:
        raise UserError(
            f"layer {unused[0]} was not used by the model on this data: its inputs are unknown",
            hint="method.targets without it: it is then frozen after the first task",
        )


def input_grams(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Batch],
    forward: Forward,
    of: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Σ x xᵀ (d, d) of each layer's inputs, in float64, on the device.

    Products of a chunk are formed in float32 (float64 for float64 inputs), their sum in float64.

    Args:
        model: on its device; run in evaluation mode, without graph.
        layers: path -> layer, from `protected_layers`.
        batches: of training examples.
        forward: runs the model on a batch.
        of: paths of the layers that are wanted, None for all.

    Raises:
        UserError: a layer, wanted or not, was never called, or takes more than 8192 inputs.
    """
    for path, layer in layers.items():
        if input_size(layer) > LARGEST_GRAM:
            raise UserError(
                f"layer {path} takes {input_size(layer)} inputs, more than the {LARGEST_GRAM} of a Gram matrix",
                hint="method.targets without it",
            )
    found = input_statistics(model, layers, batches, forward, of)
    return {path: gram for path, gram in found.items() if isinstance(gram, Tensor)}


def input_statistics(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Batch],
    forward: Forward,
    of: Collection[str] | None = None,
    largest: int = LARGEST_GRAM,
) -> dict[str, Tensor | FrequentDirections]:
    """`input_grams`, with a sketch of 1024 rows for each layer that takes more than `largest` inputs."""
    found: dict[str, Tensor | FrequentDirections] = {}

    def add(path: str, X: Tensor) -> None:
        if of is not None and path not in of:
            return
        if X.shape[1] > largest:
            sketch = found.setdefault(path, FrequentDirections(SKETCH_ROWS))
            assert isinstance(sketch, FrequentDirections)
            sketch.update(X)
            return
        gram = found.setdefault(path, X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64))
        assert isinstance(gram, Tensor)
        with torch.autocast(X.device.type, enabled=False):
            gram += matmul(X.mT, X)

    stream_inputs(model, layers, batches, forward, add)
    return found
