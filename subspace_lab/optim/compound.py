"""Several optimizers that look like one: Muon for hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override


class Compound(Optimizer):
    """Parameter groups handed to different optimizers by their ``kind``.

    The groups here carry ``lr`` and ``weight_decay``, which schedulers change; the children follow at every step.

    Args:
        params: groups, with ``kind`` "matrix" or anything else.
        matrix, other: make the child optimizer of each kind from its groups.
        lr, weight_decay: defaults of all groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        matrix: Callable[[list[dict[str, Any]]], Optimizer],
        other: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "kind": "other"})
        self._routes: list[tuple[Optimizer, int]] = []  # for each of our groups: child, index of its group there
        chosen: dict[bool, list[int]] = {True: [], False: []}
        for i, group in enumerate(self.param_groups):
            chosen[group["kind"] == "matrix"].append(i)
        routes: dict[int, tuple[Optimizer, int]] = {}
        self.children: list[Optimizer] = []
        for is_matrix, make in ((True, matrix), (False, other)):
            if not chosen[is_matrix]:
                continue
            child = make([{"params": self.param_groups[i]["params"]} for i in chosen[is_matrix]])
            self.children.append(child)
            routes |= {i: (child, j) for j, i in enumerate(chosen[is_matrix])}
        self._routes = [routes[i] for i in range(len(self.param_groups))]
        self._share_state()

    def _share_state(self) -> None:
        for child in self.children:
            child.state = self.state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_state()

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, (child, j) in zip(self.param_groups, self._routes, strict=True):
            child.param_groups[j].update(lr=group["lr"], weight_decay=group["weight_decay"])
        for child in self.children:
            child.step()
        return loss


def muon_with_adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """torch.optim.Muon for groups of kind "matrix", torch.optim.AdamW for embeddings, norms and heads.

    Muon's step is scaled to AdamW's RMS (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that both share one
    learning rate.
    """
    return Compound(
        params,
        matrix=lambda groups: Muon(
            groups, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        ),
        other=lambda groups: AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=True),
        lr=lr,
        weight_decay=weight_decay,
    )
