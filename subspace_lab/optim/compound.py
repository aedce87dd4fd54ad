"""Several optimizers that look like one: Muon beside AdamW, a manifold's beside anything."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override

from subspace_lab.optim.traits import OptimizerFactory


class Compound(Optimizer):
    """Parameter groups handed to different optimizers.

    The groups here *are* the children's own, and so is the state: schedulers, checkpoints and whatever else looks at
    an optimizer see every option and every moment, and nothing has to be kept in step.

    Args:
        params: parameter groups.
        route: group -> key of the optimizer that takes it.
        makers: key -> makes that optimizer from its groups; one without groups is not made.
        defaults: what this optimizer shows as its `defaults`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        route: Callable[[Mapping[str, Any]], Hashable],
        makers: Mapping[Any, OptimizerFactory],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(params, defaults or {})
        routes = [route(group) for group in self.param_groups]
        self.children: list[Optimizer] = []
        self._owned: list[list[int]] = []  # for each child, the places of its groups here
        for key, make in makers.items():
            mine = [i for i, chosen in enumerate(routes) if chosen == key]
            if not mine:
                continue
            child = make([_as_given(self.param_groups[i]) for i in mine])
            for i, group in zip(mine, child.param_groups, strict=True):
                self.param_groups[i] = group
            self.children.append(child)
            self._owned.append(mine)
        self._link()

    def _link(self) -> None:
        for child, mine in zip(self.children, self._owned, strict=True):
            child.__setstate__({"state": self.state, "param_groups": [self.param_groups[i] for i in mine]})

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "children" in self.__dict__:
            self._link()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "children": self.children, "_owned": self._owned}

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for child in self.children:
            child.step()
        return loss


def _as_given(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it was before torch took names and parameters apart."""
    given = {k: v for k, v in group.items() if k != "param_names"}
    if "param_names" in group:
        given["params"] = list(zip(group["param_names"], group["params"], strict=True))
    return given


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
    shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    return Compound(
        params,
        lambda group: group["kind"] == "matrix",
        {
            True: lambda groups: Muon(
                groups,
                **shared,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            False: lambda groups: AdamW(groups, **shared, betas=(betas[0], betas[1]), eps=eps, fused=True),
        },
        defaults=shared | {"kind": "other"},
    )
