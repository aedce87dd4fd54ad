"""Frequent directions: a small sketch S of a long stream of rows with SᵀS ≈ Σ a aᵀ, never above it.

Ghashami, Liberty, Phillips & Woodruff, "Frequent directions: simple and deterministic matrix sketching", SIAM J.
Comput. 2016.  CoSO (arXiv 2505.11816) sketches each step's gradients this way; its release shrinks twice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision, matmul, upcast
from subspace_lab.linalg.svd import descending_eigh

Shrink = Literal["plain", "double"]


class FrequentDirections:
    """Sketches S (B, l, d) of B streams of rows.

    With C = Σ a aᵀ: 0 ⪯ C − SᵀS and, shrinking plainly, ‖C − SᵀS‖₂ ≤ lost ≤ min_k ‖A − A_k‖_F² / (l + 1 − k).

    Args:
        rows: l, rows kept.
        shrink: plain: one shrinkage when more than l rows are there, by the (l+1)-th squared singular value; double:
            an update's own rows are cut to l and shrunk by their (l+1)-th squared singular value first (as CoSO's
            release does), which costs that much more.

    Attributes:
        sketch: S (B, l, d), longest row first; None before the first update.
        lost: (B,) the sum of all shrinkages: no direction has lost more than that.
        total: (B,) Σ |a|².
    """

    def __init__(self, rows: int, shrink: Shrink = "plain") -> None:
        if rows < 1:
            raise ValueError(f"a sketch needs at least one row, not {rows}")
        self.rows, self.shrink = rows, shrink
        self.sketch: Tensor | None = None
        self.lost = torch.zeros(())
        self.total = torch.zeros(())

    @full_precision
    def update(self, new: Tensor) -> None:
        """Take in rows (B, n, d) or (n, d), in float32 (float64 if they are)."""
        new = upcast(new if new.dim() == 3 else new.unsqueeze(0))
        if self.sketch is None:
            self.sketch = new.new_zeros(new.shape[0], 0, new.shape[2])
            self.lost = self.total = torch.zeros(new.shape[0], dtype=torch.float64, device=new.device)
        self.total = self.total + new.double().square().sum((1, 2))
        # Plainly, rows come in parts no longer than the sketch: a part costs an eigenproblem of twice its size.
        parts = torch.split(new, max(self.rows, 32), dim=1) if self.shrink == "plain" else (self._shrunk(new),)
        for part in parts:
            self.sketch = self._shrunk(torch.cat([self.sketch, part], dim=1))

    def _shrunk(self, A: Tensor) -> Tensor:
        """At most l rows: s_i <- √(s_i² − s²_{l+1})."""
        if A.shape[1] <= self.rows:
            return A
        if A.shape[1] <= A.shape[2]:
            values, U = descending_eigh(_gram(A))
            rows = matmul(U.mT.to(A.dtype), A)  # s_i v_iᵀ
        else:
            values, V = descending_eigh(_gram(A.mT))
            rows = V.mT.to(A.dtype) * values.sqrt().unsqueeze(-1).to(A.dtype)
            if rows.shape[1] <= self.rows:
                return rows
        delta = values[:, self.rows, None]
        self.lost = self.lost + delta[:, 0].double()
        kept = values[:, : self.rows]
        factor = ((kept - delta).clamp_min(0) / torch.where(kept > 0, kept, 1.0)).sqrt()
        return rows[:, : self.rows] * factor.unsqueeze(-1).to(A.dtype)

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        """Right singular vectors (B, d, l') and singular values (B, l') of the sketches, longest first.

        Raises:
            ValueError: nothing was sketched yet.
        """
        if self.sketch is None:
            raise ValueError("an empty sketch has no basis")
        values, U = descending_eigh(_gram(self.sketch))
        s = values.sqrt()
        V = matmul(self.sketch.mT, U.to(self.sketch.dtype))
        return V / torch.where(s > 0, s, 1.0).unsqueeze(1).to(V.dtype), s

    def state_dict(self) -> dict[str, Tensor]:
        """All that goes on; empty before the first update."""
        return {} if self.sketch is None else {"sketch": self.sketch, "lost": self.lost, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.sketch = state.get("sketch")
        self.lost, self.total = state.get("lost", torch.zeros(())), state.get("total", torch.zeros(()))


def _gram(A: Tensor) -> Tensor:
    """A Aᵀ in float64: singular values down to 1e-7 of the largest stay apart."""
    D = A.double()
    return D @ D.mT
