"""ROGO: gradient projection that gives back, while a task is learnt, the protected directions the task leans on.

Yang, Lin, Li, Zhou & Sun, "Restricted Orthogonal Gradient Projection for Continual Learning", AI Open 4 (2023), arXiv
2301.12131.  Beside GPM's memory M, which W's updates avoid throughout, a relaxing space S ⊂ span M:

    forward    W + W S (Q − I) Sᵀ,   Q trained from I,   loss + β |Q − I|²
    relaxing   U = the left singular vectors of the layer's gradient (in × out) that hold its energy to `energy`; the
               direction u of span M outside S that is best aligned with U joins S, as long as |U Uᵀ u| ≥ γ |u|
    end        W <- W + W S (Q − I) Sᵀ,   S <- {}

The directions that join are those of the frozen space F with principal cosine ≥ γ to U, so all are found at once:
F X with X the eigenvectors of Fᵀ U Uᵀ F of eigenvalue ≥ γ².

The paper relaxes (at most twice in a task, returning to the first learning rate) when the learning rate has decayed;
the release for permuted MNIST, whose learning rate does not, after epochs.  It draws examples for the gradient; here
those of training steps are summed up.

Here              paper
memory[path]      M
basis0 of a layer S, followed by columns of zeros up to the width of M: shapes are those of a whole relaxation
scales.0          Q
beta, gamma       β, γ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.scaled_layers import ScaledConv2d
from subspace_lab.continual.thresholds import Spec
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import Loss
from subspace_lab.methods.continual.scaling import ScalingMethod

MOST = 2  # relaxations in one task


class ROGO(ScalingMethod):
    """Projection whose frozen space is relaxed while a task is learnt.

    Args:
        threshold: ε as in `ProtectingMethod`.
        samples: examples gathered after each task.
        targets: the protected layers.
        beta: β, weight of the penalty on |Q − I|².
        gamma: γ of linear layers; above 1 nothing is relaxed, which is GPM.
        gamma_conv: γ of convolutions.
        energy: share of the gradient's energy that its subspace holds, of linear layers.
        energy_conv: the same of convolutions.
        gradient_steps: steps whose gradients are summed up for U, from the one at which a relaxation is due: with small
            batches one gradient has few directions (the release takes 125 examples, 500 for mini-ImageNet).
        decayed: relax when the learning rate is at most this share of its largest value in the task (0.05 is the
            release's 5e-4 of 1e-2 for CIFAR-100; 0.1 for mini-ImageNet), and then return to that value.
        relax_at: for a learning rate that does not decay: relax at these shares of the task instead, at most two,
            counted in steps of the task before it.
    """

    name: ClassVar[str] = "rogo"

    def __init__(
        self,
        threshold: Spec = 0.97,
        samples: int | None = 300,
        targets: Sequence[str] | None = None,
        beta: float = 1.0,
        gamma: float = 0.9,
        gamma_conv: float = 0.95,
        energy: float = 0.99,
        energy_conv: float = 0.97,
        gradient_steps: int = 1,
        decayed: float = 0.05,
        relax_at: Sequence[float] | None = None,
    ) -> None:
        if beta < 0:
            raise UserError(f"method.beta={beta}: expected 0 or a positive number")
        for option, value in (("gamma", gamma), ("gamma_conv", gamma_conv)):
            if value <= 0:
                raise UserError(f"method.{option}={value}: expected a cosine above 0 (above 1: nothing is relaxed)")
        for option, value in (("energy", energy), ("energy_conv", energy_conv), ("decayed", decayed)):
            if not 0 < value <= 1:
                raise UserError(f"method.{option}={value}: expected a share above 0 and at most 1")
        if gradient_steps < 1:
            raise UserError(f"method.gradient_steps={gradient_steps}: expected at least 1")
        if relax_at is not None and (len(relax_at) > MOST or not all(0 < f < 1 for f in relax_at)):
            raise UserError(
                f"method.relax_at={list(relax_at)}: expected at most {MOST} shares of a task between 0 and 1"
            )
        super().__init__(threshold, samples, targets)
        self.beta, self.decayed, self.gradient_steps = beta, decayed, gradient_steps
        self.gamma, self.gamma_conv = gamma, gamma_conv
        self.energy, self.energy_conv = energy, energy_conv
        self.relax_at = None if relax_at is None else list(relax_at)
        self.relaxed: dict[str, Tensor] = {}  # S (d, n)
        self._frozen: dict[str, Tensor] = {}  # F (d, k - n)
        self._gradients: dict[str, Tensor] = {}  # sums of the steps since a relaxation is due
        self._steps = self._steps_before = self._relaxations = self._gathered = 0
        self._peak, self._armed = 0.0, True

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        self.relaxed = {path: self.memory[path][:, :0] for path in self.scaled() if path in self.memory}
        self._frozen = {path: self.memory[path] for path in self.relaxed}
        self._steps_before, self._steps, self._relaxations, self._gathered = self._steps, 0, 0, 0
        self._gradients = {}
        self._peak, self._armed = 0.0, True

    @override
    def install(self, model: nn.Module, index: int) -> None:
        super().install(model, index)
        for path, layer in self.scaled().items():
            S = self.relaxed.get(path)
            if S is None:
                continue
            k = self.memory[path].shape[1]
            layer.set_regions([nn.functional.pad(S, (0, k - S.shape[1]))] if k else [])
            layer.dormant = not S.shape[1]
            for Q in layer.scales:
                Q.requires_grad_(True)

    @override
    def objective(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        penalty = [
            (Q - torch.eye(len(Q), dtype=Q.dtype, device=Q.device)).square().sum()
            for layer in self.scaled().values()
            for Q in layer.scales
        ]
        value = loss(model, batch)
        return value + self.beta * torch.stack(penalty).sum() if penalty else value

    @override
    def after_step(self, optimizer: Optimizer) -> None:
        self._steps += 1
        if not self._frozen or (self._relaxations >= MOST and not self._gathered):
            return
        lr = float(optimizer.param_groups[0]["lr"])
        self._peak = max(self._peak, lr)
        if self._due(lr):
            self._relaxations += 1
            self._gathered = 1
        elif self._gathered:
            self._gathered += 1
        if not self._gathered:
            return
        for path, layer in self.scaled().items():
            if layer.weight.grad is not None:
                G = layer.weight.grad.flatten(1).float()
                self._gradients[path] = self._gradients[path].to(G) + G if path in self._gradients else G.clone()
        if self._gathered >= self.gradient_steps:
            found = self._relax()
            if found and self.relax_at is None and lr > 0:
                for group in optimizer.param_groups:  # a schedule in closed form takes it back at its next step
                    group["lr"] *= self._peak / lr

    def _due(self, lr: float) -> bool:
        """Whether a relaxation starts at this step."""
        if self._relaxations >= MOST or self._gathered:
            return False
        if self.relax_at is not None:
            return self._steps in [max(1, round(f * self._steps_before)) for f in self.relax_at]
        low = lr <= self.decayed * self._peak
        due, self._armed = low and self._armed, not low
        return due

    @torch.no_grad()
    def _relax(self) -> bool:
        """Move to S what the gathered gradients ask for; whether that is anything.

        Runs at most twice in a task, and reads from the device.
        """
        found = False
        for path, G in self._gradients.items():
            F, layer = self._frozen.get(path), self.scaled()[path]
            if F is None or not F.shape[1]:
                continue
            conv = isinstance(layer, ScaledConv2d)
            energy, gamma = (self.energy_conv, self.gamma_conv) if conv else (self.energy, self.gamma)
            new, rest = relaxing_directions(F.to(G.device), G, energy, gamma)
            if not new.shape[1]:
                continue
            S = torch.cat([self.relaxed[path].to(new), new], dim=1).float()
            self.relaxed[path], self._frozen[path] = S, rest.float()
            layer.regions()[0][0][:, : S.shape[1]] = S
            layer.dormant, found = False, True
        self._gradients, self._gathered = {}, 0
        return found

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Fold the scalings into the weights, then gather."""
        for layer in self.scaled().values():
            layer.fold()
        self.relaxed, self._frozen, self._gradients, self._gathered = {}, {}, {}, 0
        super().end_task(model, task)

    @override
    def metrics(self) -> dict[str, Tensor | float]:
        return {"relaxed": float(sum(S.shape[1] for S in self.relaxed.values()))} if self.relaxed else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "relaxed": {path: S.cpu() for path, S in self.relaxed.items()},
            "frozen": {path: F.cpu() for path, F in self._frozen.items()},
            "gradients": {path: G.cpu() for path, G in self._gradients.items()},
            "steps": [self._steps, self._steps_before, self._relaxations, self._gathered],
            "rate": [self._peak, float(self._armed)],
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.relaxed = {path: S.clone() for path, S in state["relaxed"].items()}
        self._frozen = {path: F.clone() for path, F in state["frozen"].items()}
        self._gradients = {path: G.clone() for path, G in state["gradients"].items()}
        self._steps, self._steps_before, self._relaxations, self._gathered = state["steps"]
        self._peak, self._armed = state["rate"][0], bool(state["rate"][1])


def relaxing_directions(F: Tensor, G: Tensor, energy: float, gamma: float) -> tuple[Tensor, Tensor]:
    """What a gradient asks back of the frozen space.

    Args:
        F: frozen space (d, k), orthonormal columns.
        G: gradient (out, d).
        energy: share of |G|² that U holds.
        gamma: cosine from which on a direction is given back; above 1 nothing is.

    Returns:
        The directions given back (d, n), best aligned first, and an orthonormal basis (d, k − n) of the rest; float64.
    """
    F, G = F.double(), torch.nan_to_num(G.double())
    _, s, Vh = torch.linalg.svd(G, full_matrices=False)
    before = s.square().cumsum(0) - s.square()
    U = Vh.mT * (before < energy * s.square().sum())
    cosines = U.mT @ F
    values, X = torch.linalg.eigh(cosines.mT @ cosines)
    basis = F @ X.flip(1)
    n = int((values >= gamma**2).sum())
    return basis[:, :n], basis[:, n:]
