"""Concrete subspace learning: one soft mask over all parameters, shared by the tasks, learnt without labels.

Tang et al. 2023, arXiv 2312.06173; released code tanganke/subspace_fusion, later in FusionBench.  With a logit x for
every parameter, u ~ U(0, 1), D_t = W_t − W0, H the entropy of softmax, i over the n parameters of a tensor:

    m = sigmoid((logit(u) + x) / τ)                      RelaxedBernoulli (Maddison et al. 2017)
    m̂ = m / mean_i(m)                                    of every tensor; x is differentiated through it
    W(x, λ) = W0 + Σ_t λ_t m̂ ∘ D_t
    x <- Adam(x, ∇_x Σ_t mean H(head_t(f(x; W))))        u drawn anew every step

inner: none          Concrete task arithmetic: λ is `scale`.
inner: first_order   Concrete AdaMerging.  In each step λ starts from `scale` again and takes one step of Adam with rate
                     `inner_lr`, clamped to [0, 1]; x takes its step at that λ, on fresh images, as if λ were a
                     constant (no second derivatives).  Then x is frozen, one m̂ is drawn, and `adapt_steps` of
                     AdaMerging follow on the masked task vectors.

Adam's moments of λ live on from step to step, as released.  Where λ starts from `scale` again, the released loops still
take its gradient at the weights of the step before; here it is taken at `scale`, as the paper has it.  FusionBench does
not clamp, and takes 1000 steps instead of 2000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, uniform
from subspace_lab.merging.base import Stack
from subspace_lab.merging.coefficients import (
    Wise,
    adapt,
    clamped,
    coefficients_by_name,
    describe_coefficients,
    initial_coefficients,
    weighted_sum,
)
from subspace_lab.merging.entropy import Progress, TestEntropy
from subspace_lab.merging.learning import LearningMerge, check_positive, entries, under
from subspace_lab.merging.task_vectors import TaskVectors
from subspace_lab.merging.workshop import Workshop

EvalMask = Literal["sampled", "expected", "discrete"]


class Concrete(LearningMerge):
    """A shared mask of the task vectors, learnt on the test images, without their labels.

    Args:
        inner: none (task arithmetic) | first_order (AdaMerging).
        scale: λ; with an inner problem what it starts from.
        wise: of the inner problem: layer: λ of every tensor and task; task: of every task.
        temperature: τ.
        lr: Adam's learning rate for x.
        steps: of x.
        inner_lr: Adam's learning rate for λ while x is learnt.
        clamp: use λ clamped to [0, 1].
        adapt_steps: of AdaMerging once x is frozen.
        adapt_lr: Adam's learning rate for λ then.
        batch_size: images of every task in a step.
        eval_mask: of the merged model: sampled: drawn from the seed, soft; discrete: drawn, 0 or 1; expected:
            sigmoid(x).  All are divided by their mean in every tensor.
    """

    elementwise: ClassVar[bool] = True
    transductive: ClassVar[bool] = True

    def __init__(
        self,
        inner: Literal["none", "first_order"] = "none",
        scale: float = 0.3,
        wise: Wise = "layer",
        temperature: float = 0.5,
        lr: float = 1e-3,
        steps: int = 2000,
        inner_lr: float = 1.0,
        clamp: bool = True,
        adapt_steps: int = 1000,
        adapt_lr: float = 1e-3,
        batch_size: int = 16,
        eval_mask: EvalMask = "sampled",
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, lr=lr, inner_lr=inner_lr, adapt_lr=adapt_lr, batch_size=batch_size)
        for option, value in {"steps": steps, "adapt_steps": adapt_steps}.items():
            if value < 0:
                raise UserError(f"method.{option}={value}: expected 0 or more")
        self.inner, self.initial, self.wise, self.temperature = inner, scale, wise, temperature
        self.lr, self.steps, self.inner_lr, self.clamp = lr, steps, inner_lr, clamp
        self.adapt_steps, self.adapt_lr = adapt_steps, adapt_lr
        self.batch_size, self.eval_mask = batch_size, eval_mask
        self._logits: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._coefficients: dict[str, Tensor] = {}
        self._seed = 0
        self._learned: dict[str, Any] = {}

    @override
    def learn(self, workshop: Workshop) -> None:
        vectors = TaskVectors(workshop)
        objective = TestEntropy(workshop, self.batch_size, "concrete")
        raw = initial_coefficients(vectors, self.wise, self.initial, workshop.device)
        before = vectors.merged(raw.detach())
        logits = self._learn_mask(workshop, vectors, objective, raw.detach().clone())
        self._seed = workshop.seed
        self._logits = {name: x.clone() for name, x in vectors.by_name(logits).items()}
        self._draw_masks()
        if self.inner == "first_order":
            adapt(
                raw,
                lambda used: self._masked(vectors, vectors.sums(used)),
                objective,
                clamp=self.clamp,
                lr=self.adapt_lr,
                steps=self.adapt_steps,
                what="coefficients under the mask",
            )
            raw = clamped(raw.detach(), self.clamp)
        used = raw.detach()
        self._coefficients = coefficients_by_name(used, vectors)
        p = torch.sigmoid(logits)
        self._learned = {
            "inner": self.inner,
            "mask_probability": {"mean": round(float(p.mean()), 5), "deviation": round(float(p.std()), 5)},
            **(describe_coefficients(used, self.adapt_steps, self.wise) if self.inner == "first_order" else {}),
            "mask_steps": self.steps,
            "predictions": objective.report(before, self._masked(vectors, vectors.sums(used))),
        }

    def _learn_mask(self, workshop: Workshop, vectors: TaskVectors, objective: TestEntropy, initial: Tensor) -> Tensor:
        """Logits x (n_1 + … + n_K,) after `steps`."""
        logits = torch.zeros(sum(vectors.sizes), device=workshop.device, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=self.lr)
        raw = initial.clone().requires_grad_()
        inner_optimizer = torch.optim.Adam([raw], lr=self.inner_lr)
        generator = torch.Generator(workshop.device).manual_seed(derive_key("concrete/1", workshop.seed))
        progress = Progress(workshop, "mask", self.steps)
        sums = vectors.sums(initial)
        for index in range(self.steps):
            noise = torch.rand(logits.shape, generator=generator, device=logits.device)
            if self.inner == "first_order":
                with torch.no_grad():
                    raw.copy_(initial)
                    fixed = rescaled(torch.split(relaxed(noise, logits, self.temperature), vectors.sizes))
                inner_optimizer.zero_grad()
                used = clamped(raw, self.clamp)
                objective.backward(vectors.moved([U * m for U, m in zip(vectors.sums(used), fixed, strict=True)]))
                inner_optimizer.step()
                with torch.no_grad():
                    sums = vectors.sums(clamped(raw, self.clamp))
            optimizer.zero_grad()
            masks = rescaled(torch.split(relaxed(noise, logits, self.temperature), vectors.sizes))
            entropy = objective.backward(vectors.moved([U * m for U, m in zip(sums, masks, strict=True)]))
            optimizer.step()
            progress.step(index, entropy)
        return logits.detach()

    def _masked(self, vectors: TaskVectors, sums: list[Tensor]) -> dict[str, Tensor]:
        masks = [self._masks[name].reshape(-1) for name in vectors.names]
        return vectors.moved([U * m for U, m in zip(sums, masks, strict=True)])

    def _draw_masks(self) -> None:
        """m̂ of the merged model, from x and the seed: the same on every device."""
        self._masks = {}
        for name, x in self._logits.items():
            m = torch.sigmoid(x)
            if self.eval_mask != "expected":
                key = derive_key("concrete/mask/1", self._seed, name)
                noise = uniform(tuple(x.shape), key=key, device=x.device)
                m = relaxed(noise, x, self.temperature)
            if self.eval_mask == "discrete":
                m = (m > 0.5).float()
            self._masks[name] = rescaled([m])[0]

    @override
    def update(self, stack: Stack) -> Tensor:
        U = weighted_sum(stack, self._coefficients)
        return U.mul_(entries(self._masks, stack).to(U))

    @override
    def learned(self) -> dict[str, Any]:
        return self._learned

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {
            "seed": torch.tensor(self._seed),
            **{f"logits/{name}": value for name, value in self._logits.items()},
            **{f"coefficients/{name}": value for name, value in self._coefficients.items()},
        }

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._seed = int(state["seed"])
        self._logits = under("logits/", state)
        self._coefficients = under("coefficients/", state)
        self._draw_masks()


def relaxed(noise: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """A sample of RelaxedBernoulli(τ, logits) from uniform noise of the same shape: in (0, 1), differentiable."""
    eps = torch.finfo(noise.dtype).eps
    u = noise.clamp(eps, 1 - eps)
    return torch.sigmoid((u.log() - (-u).log1p() + logits) / temperature)


def rescaled(masks: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Each m / mean(m); a mask of zeros stays one."""
    return [m / m.mean().clamp_min(torch.finfo(m.dtype).tiny) for m in masks]
