"""GaLore: memory-efficient LLM training by gradient low-rank projection.

Zhao, Zhang, Chen, Wang, Anandkumar & Tian, ICML 2024, arXiv 2403.03507.  Algorithm 2, for a weight W (m × n):

    every T steps     P = the r leading singular vectors of G's short side
    each step         R = Pᵀ G,   M, V <- Adam's moments of R,   N = M̂ / (√V̂ + ε)
                      W <- W − η α P N

Here            paper
method.rank     r
refresh_every   T
scale           α
basis           P  (on the last dimension of the stack; left for wide weights through a transpose)
coordinates Z   R
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.methods.base import Method, split_parameters
from subspace_lab.optim.moments import Moments
from subspace_lab.optim.stack import orientation
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.subspaces import SVD, Span, Subspace

RELEASE_EPS = 1e-6


class GaLore(Method):
    """Any optimizer inside the gradient's leading subspace.

    Args:
        subspace: how bases are chosen (its rank is ``method.rank``).
        rank: number of directions r per matrix; a fraction in (0, 1) is taken of the side.
        refresh_every: steps T between refreshes; 0 keeps the first basis for ever.
        scale: factor α on the projected update.
        variant: ``paper`` is algorithm 2 with ε as torch has it and singular vectors' signs aligned across
            refreshes; ``release`` is galore-torch 1.0: ε = 1e-6 (unless the optimizer's is changed) added before
            bias correction, decay after the step, LAPACK's own signs.
        moments: what a refresh does to Adam's moments: ``keep`` (both variants of the paper), ``rotate``, ``reset``.
        stagger: spread refreshes over the interval.
        per_layer: step in the backward pass and free gradients at once.
        targets: paths of the projected layers: regular expressions, or ``all-linear``.
    """

    name = "galore"

    def __init__(
        self,
        subspace: Subspace | None = None,
        rank: int | float = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
        variant: Literal["paper", "release"] = "paper",
        moments: Literal["keep", "rotate", "reset"] = "keep",
        stagger: bool = False,
        per_layer: bool = False,
        targets: str | Sequence[str] = ("attn", "mlp"),
    ) -> None:
        if refresh_every < 0:
            raise UserError(f"method.refresh_every must be 0 (never again) or positive, not {refresh_every}")
        if scale <= 0:
            raise UserError(f"method.scale must be positive, not {scale}")
        if rank <= 0:
            raise UserError(f"method.rank must be positive, not {rank}")
        self.subspace = subspace if subspace is not None else SVD(rank)
        self.refresh_every, self.scale, self.variant = refresh_every, scale, variant
        self.moments: Moments = moments
        self.stagger, self.per_layer, self.targets = stagger, per_layer, targets
        self._optimizer: SubspaceOptimizer | None = None
        if variant == "release" and isinstance(self.subspace, Span):
            self.subspace.align_signs = False
            if isinstance(self.subspace, SVD):
                self.subspace.native_orientation = True

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        inside, outside = split_parameters(model, self.targets)
        if not inside:
            layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:4]
            raise UserError(
                f"method.targets={self.targets!s} matches no layer of the model, whose linear layers are {layers} …",
                hint="method.targets=all-linear",
            )
        projected = {"params": inside, "subspace": self.subspace, "scale": self.scale, "kind": "matrix"}
        return [projected] + ([{"params": outside, "kind": "other"}] if outside else [])

    @override
    def shard_dimensions(self, model: nn.Module) -> dict[str, int]:
        # The side of the basis stays whole: then gradients are projected where they lie.
        inside, _ = split_parameters(model, self.targets)
        return {name: int(orientation(p, self.subspace.side)) for name, p in inside}

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        release = self.variant == "release"
        optimizer = SubspaceOptimizer(
            self.param_groups(model),
            factory,
            refresh_every=self.refresh_every,
            moments=self.moments,
            stagger=self.stagger,
            per_layer=self.per_layer,
            eps_before_correction=release,
            decay_after=release,
        )
        for group in optimizer.param_groups:
            if release and group.get("eps") == 1e-8:
                group["eps"] = RELEASE_EPS
        self._optimizer = optimizer
        return optimizer

    @override
    def metrics(self) -> dict[str, Tensor | float]:
        return self._optimizer.metrics() if self._optimizer is not None else {}
