"""Which attack accuracies are measured under, made from what the protocol is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_lab.analysis.adversarial import fgsm, pgd
from subspace_lab.continual.objective import Attack

_REACH = 2.5  # of all of pgd's steps together, in ε (Madry et al., ICLR 2018)


def make_attack(kind: Literal["fgsm", "pgd"], epsilon: float, steps: int, seed: int, data: Any) -> Attack:
    """Return an attack within ε of every input, in the largest norm.

    Args:
        kind: fgsm: one step; pgd: several, from a random start.
        epsilon: in units of the normalised input.
        steps: of pgd.
        seed: of its start.
        data: an image data module, whose pixels stay between black and white; others have no bounds.
    """
    bounds = None
    if hasattr(data, "presentation"):
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.presentation.mean, data.presentation.std))
        bounds = (-mean / std, (1 - mean) / std)
    one: Callable[..., Tensor] = fgsm
    if kind == "pgd":
        one = partial(pgd, steps=steps, step_size=_REACH * epsilon / steps, seed=seed)

    def attack(outputs: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return one(outputs, inputs, labels.clamp(min=0), epsilon, bounds=bounds)

    return attack
