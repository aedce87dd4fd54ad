"""Federated gradient projection, and federated domain adaptation, as rules of a server.

Jiang, Zhang & Koyejo, "Principled Federated Domain Adaptation: Gradient Projection and Auto-Weighting", ICLR 2024,
arXiv 2302.05049.  Equations and symbols: `subspace_lab.federated.gradient_projection`.

One client is the target, with few examples of what the model is for; all others are sources.  It takes part in every
round.  ``beta: auto`` needs the update of each single optimizer step of the target, of which there have to be two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.federated.gradient_projection import Rule, Variant, adapt, auto_beta
from subspace_lab.methods.federated.base import FederatedMethod, Round


class FedGP(FederatedMethod):
    """The target's update and what of the sources' agrees with it.

    Args:
        target: the target client.
        beta: β, the weight of the sources, 0 … 1; auto: of each source by how far it is from the target, compared with
            how much the target's own steps disagree.
        rule: projection: FedGP, the target's update projected onto each source's, parameter by parameter, where they
            agree; convex: FedDA, the sources' updates as they are.
        variant: paper, or release: what the released code does in place of the projection and of β.
        warmup: rounds at the start in which the sources are averaged and the target is not heard; 2 as released.
        server_lr: factor of the aggregated update.
    """

    name: ClassVar[str] = "fedgp"
    needs_each: ClassVar[bool] = True

    def __init__(
        self,
        target: int = 0,
        beta: float | Literal["auto"] = 0.5,
        rule: Rule = "projection",
        variant: Variant = "paper",
        warmup: int = 2,
        server_lr: float = 1.0,
    ) -> None:
        if target < 0:
            raise UserError(f"method.target={target}: expected the number of a client, from 0")
        if beta != "auto" and not 0 <= beta <= 1:
            raise UserError(f"method.beta={beta}: expected a number from 0 to 1, or auto")
        if warmup < 0:
            raise UserError(f"method.warmup={warmup}: expected 0 or a positive number of rounds")
        super().__init__(server_lr)
        self.target, self.beta, self.rule, self.variant, self.warmup = target, beta, rule, variant, warmup

    @override
    def check(self, participants: int) -> None:
        if participants < 2:
            raise UserError("method=fedgp: the target and at least one source have to take part in a round")

    @override
    def always(self) -> tuple[int, ...]:
        return (self.target,)

    @override
    def wants_steps(self) -> int | None:
        return self.target if self.beta == "auto" else None

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        target = about.clients.index(self.target)
        sources = [row for row in range(len(updates)) if row != target]
        if about.index < self.warmup:
            shares = torch.zeros_like(weights).index_copy(0, torch.tensor(sources).to(weights.device), weights[sources])
            return (shares / shares.sum()).to(updates.dtype) @ updates
        return adapt(
            updates,
            target,
            weights,
            parts,
            self._beta(updates, sources, about),
            rule=self.rule,
            variant=self.variant,
            steps=about.steps,
        )

    def _beta(self, updates: Tensor, sources: list[int], about: Round) -> Tensor:
        if self.beta != "auto":
            return torch.full((len(sources),), float(self.beta), dtype=torch.float64)
        if about.single_steps is None or len(about.single_steps) < 2:
            raise UserError(
                "method.beta=auto needs two or more optimizer steps of the target client in a round",
                hint="a smaller data.batch_size, more federation.local_epochs, or a number in beta's place",
            )
        counts = updates.new_tensor([about.steps[row] for row in sources])
        steps = about.single_steps.to(updates)
        return auto_beta(steps, updates[sources] / counts[:, None], rule=self.rule, variant=self.variant)
