"""DGP: the weights keep old outputs and also how old outputs depend on the inputs, which is what robustness is made of.

Ru, Cao, Liu, Moore, Zhang, Zhu, Wei & Yan, "Maintaining Adversarial Robustness in Continuous Learning", arXiv
2402.11196 (double gradient projection).  With x the network's input and x^l that of layer l:

    outputs            ΔW x^l = 0 for old inputs, GPM's condition
    sample gradients   ΔW ∂x^l/∂x = 0, then by the chain rule ∂x^{l+1}/∂x stays, and so on         (eqs. 8 to 11)
    compressed         Σ_j ∂x^l/∂x_j, one vector for each example instead of a matrix               (eq. 12)

so M gets the leading directions of the old inputs, then those of the summed Jacobians.  The sum is the derivative of
x^l along the all-ones vector, computed in forward mode.  For the first layer ∂x/∂x is the identity, which would leave
nothing to move: in the paper each task has its own first layer.

A defence by smooth sample gradients has to make the network robust in the first place: a penalty on the input gradient
(Ross & Doshi-Velez 2018), λ mean |∇_x L|², or training on adversarial examples.

There is no released code, and the full text was not at hand: equations 8 to 12, the independent first layer, and
batch/epochs/λ = 32/10/50 of one experiment are as a review of the paper states them; the thresholds are not in the
paper.  Not known: whether λ multiplies a mean over examples (as here, where 50 would stop all learning on digits) and
how a task's own first layer starts (here: from the one before).

Here                  paper
memory[path]          both bases, orthonormalised
threshold             α of the outputs' basis
gradient_threshold    α of the sample gradients' basis
strength              λ
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from subspace_lab.continual.activations import Layers, input_rows
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.thresholds import Spec, Thresholds
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import Loss
from subspace_lab.methods.continual.projection import GPM
from subspace_lab.methods.continual.protecting import Statistic


class DGP(GPM):
    """GPM that stabilises sample gradients too, with a defence to be maintained.

    Args:
        threshold: ε of the inputs, as in `ProtectingMethod`.
        samples: examples gathered after each task.
        targets: the protected layers.
        gradient_threshold: share of the energy of the summed Jacobians that is protected; same forms as `threshold`.
        first_layer: own: each task has a first layer of its own and has to be known at test time (the paper);
            projected: protected as all others, with the summed Jacobian, which does not hold its sample gradients;
            frozen: kept from the first task on, which does.
        defense: gradient: penalty on the input gradient; adversarial: training on examples of PGD; none.
        strength: λ, of the penalty.
        epsilon: L∞ radius of the adversarial examples, in units of the inputs.
        attack_steps: steps of PGD in training, each 2.5 ε / steps long.
    """

    name: ClassVar[str] = "dgp"

    def __init__(
        self,
        threshold: Spec = 0.97,
        samples: int | None = 300,
        targets: Sequence[str] | None = None,
        gradient_threshold: Spec = 0.99,
        first_layer: Literal["own", "projected", "frozen"] = "own",
        defense: Literal["gradient", "adversarial", "none"] = "gradient",
        strength: float = 0.25,
        epsilon: float = 0.1,
        attack_steps: int = 5,
    ) -> None:
        if first_layer not in ("own", "projected", "frozen"):
            raise UserError(f"method.first_layer={first_layer}: expected own, projected or frozen")
        if defense not in ("gradient", "adversarial", "none"):
            raise UserError(f"method.defense={defense}: expected gradient, adversarial or none")
        if strength < 0 or epsilon <= 0 or attack_steps < 1:
            raise UserError(
                f"method.strength={strength}, epsilon={epsilon}, attack_steps={attack_steps}: "
                "expected a strength of 0 or more, a positive radius and at least 1 step"
            )
        super().__init__(threshold, samples, targets)
        self.gradient_thresholds = Thresholds(gradient_threshold, "method.gradient_threshold")
        self.first_layer, self.defense = first_layer, defense
        self.strength, self.epsilon, self.attack_steps = strength, epsilon, attack_steps
        self._own: list[dict[str, Tensor]] = []  # the first layer of each finished task

    def _first(self) -> str:
        return next(iter(self.layers))

    # -- training ----------------------------------------------------------------------------------------------

    @override
    def install(self, model: nn.Module, index: int) -> None:
        super().install(model, index)
        if self.first_layer != "projected" and index > 0:
            for p in self.layers[self._first()].parameters():
                p.requires_grad_(self.first_layer == "own")

    @override
    def objective(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        """The loss with the defence; the batch needs floating ``inputs``."""
        if self.defense == "none" or not model.training:
            return loss(model, batch)
        x = _floating_inputs(batch)
        if self.defense == "adversarial":
            return loss(model, {**batch, "inputs": self._attacked(model, batch, x, loss)})
        x = x.detach().requires_grad_()
        value = loss(model, {**batch, "inputs": x})
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        # The loss is a mean over n examples, so n g are their own gradients.
        return value + self.strength * len(x) * g.square().sum()

    def _attacked(self, model: nn.Module, batch: Batch, x: Tensor, loss: Loss) -> Tensor:
        x = x.detach()
        moved = x + self.epsilon * (2 * torch.rand_like(x) - 1)
        for _ in range(self.attack_steps):
            moved = moved.detach().requires_grad_()
            (g,) = torch.autograd.grad(loss(model, {**batch, "inputs": moved}), moved)
            step = 2.5 * self.epsilon / self.attack_steps * g.sign()
            moved = torch.maximum(torch.minimum(moved + step, x + self.epsilon), x - self.epsilon)
        return moved.detach()

    # -- after a task ------------------------------------------------------------------------------------------

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        super().end_task(model, task)
        first = self._first()
        tensors: dict[str, Tensor] = {}
        if task.leads:
            batches = task.batches(count=self.samples)
            for path, gram in summed_jacobian_grams(model, self.layers, batches, task.forward).items():
                threshold = self.gradient_thresholds.at(path, task.index)
                tensors |= self.remember(path, gram, threshold)
        self.receive(task.share(tensors))
        if self.first_layer == "own":
            del self._own[task.index :]
            self._own.append({n: p.detach().clone() for n, p in self.layers[first].named_parameters()})

    @override
    def remember(self, path: str, statistic: Statistic, threshold: float) -> dict[str, Tensor]:
        if self.first_layer != "projected" and path == self._first():
            return {}
        return super().remember(path, statistic, threshold)

    @contextmanager
    def _as_of(self, index: int) -> Iterator[None]:
        now = dict(self.layers[self._first()].named_parameters())
        kept = {n: p.detach().clone() for n, p in now.items()}
        _fill(now, self._own[index])
        try:
            yield
        finally:
            _fill(now, kept)

    @override
    def as_of(self, model: nn.Module, index: int) -> AbstractContextManager[None]:
        """A finished task's own first layer."""
        return self._as_of(index) if index < len(self._own) else nullcontext()

    @override
    def basis_bytes(self) -> int:
        own = [p for parameters in self._own for p in parameters.values()]
        return super().basis_bytes() + sum(p.numel() * p.element_size() for p in own)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"own": [{n: p.cpu() for n, p in own.items()} for own in self._own]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._own = [{n: p.clone() for n, p in own.items()} for own in state["own"]]


@torch.no_grad()
def _fill(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])


def _floating_inputs(batch: Batch) -> Tensor:
    x = batch.get("inputs")
    if x is None or not x.is_floating_point():
        raise UserError("method=dgp needs inputs that a gradient can be taken of, such as images", hint="method=gpm")
    return x


def summed_jacobian_grams(
    model: nn.Module,
    layers: Layers,
    batches: Iterator[Batch],
    forward: Callable[[nn.Module, Batch], Any],
) -> dict[str, Tensor]:
    """Σ v vᵀ (d, d) with v = Σ_j ∂x^l/∂x_j for every example (and position, or patch) of each layer's inputs x^l.

    Args:
        model: on its device; run in evaluation mode.
        layers: path -> linear or convolution layer.
        batches: with floating ``inputs``.
        forward: runs the model on a batch.

    Returns:
        float64, by path; a layer that the inputs do not reach is missing.

    Raises:
        UserError: the batch has no floating ``inputs``.
    """
    grams: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            tangent = forward_ad.unpack_dual(arguments[0]).tangent  # type: ignore[no-untyped-call]
            for rows in () if tangent is None else input_rows(layer, tangent):
                rows = rows.double()
                grams[path] = grams[path] + rows.mT @ rows if path in grams else rows.mT @ rows

        return watch

    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    model.eval()
    try:
        # Fused attention has no forward mode; torch's own rules for it are scripted, which torch itself deprecates.
        with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            warnings.simplefilter("ignore", FutureWarning)
            for batch in batches:
                x = _floating_inputs(batch)
                dual = forward_ad.make_dual(x, torch.ones_like(x))  # type: ignore[no-untyped-call]
                forward(model, {**batch, "inputs": dual})
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return grams
