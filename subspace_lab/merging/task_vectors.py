"""W0 + Σ_t λ_t D_t as a function of λ: the task vectors are kept once, and no step copies them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from subspace_lab.merging.learning import computing, floating
from subspace_lab.merging.workshop import Workshop


class TaskVectors:
    """W0 and the T task vectors of a workshop.

    Attributes:
        names: of the K tensors that are merged.
        shapes: of them.
        sizes: entries of each.
    """

    def __init__(self, workshop: Workshop) -> None:
        base = floating(workshop.base)
        self.names = list(base)
        self.shapes = [tensor.shape for tensor in base.values()]
        self.sizes = [tensor.numel() for tensor in base.values()]
        self.models = len(workshop.models)
        self._base = [computing(tensor).reshape(-1) for tensor in base.values()]
        self._D = [
            torch.stack([computing(model[name]).reshape(-1) for model in workshop.models]).sub_(W0)
            for name, W0 in zip(self.names, self._base, strict=True)
        ]

    def sums(self, coefficients: Tensor) -> list[Tensor]:
        """Σ_t λ_tk D_tk of every tensor, flat (n_k,): differentiable in λ.

        Args:
            coefficients: λ (T, K), or (T, 1) for the same in every tensor.
        """
        columns = coefficients.expand(-1, len(self.names)).unbind(1)
        return [torch.mv(D.mT, column.to(D)) for D, column in zip(self._D, columns, strict=True)]

    def moved(self, updates: list[Tensor]) -> dict[str, Tensor]:
        """W0 + U by name, for flat U (n_k,)."""
        return {
            name: (W0 + U).view(shape)
            for name, shape, W0, U in zip(self.names, self.shapes, self._base, updates, strict=True)
        }

    def merged(self, coefficients: Tensor) -> dict[str, Tensor]:
        """W0 + Σ_t λ_t D_t by name, differentiable in λ (T, K) or (T, 1)."""
        columns = coefficients.expand(-1, len(self.names)).unbind(1)
        return {
            name: torch.addmv(W0, D.mT, column.to(D)).view(shape)
            for name, shape, W0, D, column in zip(self.names, self.shapes, self._base, self._D, columns, strict=True)
        }

    def by_name(self, flat: Tensor) -> Mapping[str, Tensor]:
        """One value per parameter (n_1 + … + n_K,) -> name -> view of its tensor's."""
        parts = zip(self.names, self.shapes, torch.split(flat, self.sizes), strict=True)
        return {name: part.view(shape) for name, shape, part in parts}
