"""Figures that the optimizer keeps about itself; device scalars until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.split_rows import SplitRows, total
from subspace_lab.optim.stopwatch import Stopwatch


class Meter:
    """Counts refreshes, times them and, while `measure` is on, sums gradient energy in and out of the subspace."""

    def __init__(self) -> None:
        self.measure = False
        self.refreshes = 0
        self.watch = Stopwatch()
        self._energy: list[tuple[Tensor, Tensor]] = []

    def add_energy(self, Z: Tensor, whole: list[Tensor], rows: SplitRows | None = None) -> None:
        """One stack's ‖Z‖² beside its gradients' squared norms, of all processes that have rows of them."""
        pair = total(torch.stack([Z.square().sum(), torch.stack(whole).sum()]), rows)
        self._energy.append((pair[0], pair[1]))

    def figures(self) -> dict[str, Tensor | float]:
        """Figures since the last call; no host sync."""
        figures: dict[str, Tensor | float] = {"refreshes": float(self.refreshes)}
        if self._energy:
            kept = torch.stack([k for k, _ in self._energy]).sum()
            whole = torch.stack([w for _, w in self._energy]).sum()
            figures["captured_energy"] = kept / whole.clamp_min(torch.finfo(whole.dtype).tiny)
            self._energy.clear()
        return figures
