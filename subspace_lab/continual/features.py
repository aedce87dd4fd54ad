"""What the last layer of a classifier is given: features, looked at while an ordinary forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from subspace_lab.errors import UserError
from subspace_lab.models.heads import find_head
from subspace_lab.models.task_heads import TaskHeads, find_task_heads


class Glimpse:
    """Features and logits of the last forward pass."""

    def __init__(self) -> None:
        self._features: Tensor | None = None
        self._logits: Tensor | None = None

    def look(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Note what goes in and what comes out (a forward hook)."""
        self._features, self._logits = inputs[0], output

    @property
    def features(self) -> Tensor:
        """(b, n), with graph.

        Raises:
            UserError: the pass went around the layer's hooks, or its features are not vectors.
        """
        if self._features is None:
            raise UserError("the features of a compiled model cannot be seen", hint="trainer.compile=false")
        if self._features.dim() != 2:
            raise UserError(f"expected one feature vector per example, not a shape of {tuple(self._features.shape)}")
        return self._features

    @property
    def logits(self) -> Tensor:
        """(b, outputs), with graph."""
        assert self._logits is not None or self.features is not None
        assert self._logits is not None
        return self._logits


def output_layer(model: nn.Module) -> nn.Module:
    """Return the layer that turns features into logits: the `TaskHeads`, else what `find_head` finds."""
    return find_task_heads(model) or find_head(model)[1]


def feature_size(model: nn.Module) -> int:
    """Return how many features the output layer takes."""
    return int(output_layer(model).in_features)  # type: ignore[arg-type]


def outputs(model: nn.Module, tasks: int | None = None) -> int:
    """Return how many outputs a model has for its first `tasks` tasks (None: for all of them).

    With a single head the tasks share all outputs.
    """
    heads = find_task_heads(model)
    if heads is not None:
        return sum(heads.sizes[:tasks])
    layer = output_layer(model)
    return int(layer.out_features) if isinstance(layer, nn.Linear) else len(layer.weight)  # type: ignore[arg-type]


def all_logits(model: nn.Module, features: Tensor) -> Tensor:
    """Return the logits (b, all outputs) of features, those of tasks that are not active among them."""
    layer = output_layer(model)
    if not isinstance(layer, TaskHeads):
        logits: Tensor = layer(features)
        return logits
    active = layer.active
    layer.active = range(len(layer.sizes))
    try:
        logits = layer(features)
        return logits
    finally:
        layer.active = active


@contextmanager
def watching(model: nn.Module) -> Iterator[Glimpse]:
    """Within, every forward pass of the model leaves its features and logits in the `Glimpse`."""
    glimpse = Glimpse()
    handle = output_layer(model).register_forward_hook(glimpse.look)
    try:
        yield glimpse
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
