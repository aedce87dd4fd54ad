"""TSV-M: the leading singular vectors of every task, made orthogonal to one another.

Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri & Rodolà, "Task Singular Vectors: Reducing Task Interference in
Model Merging", CVPR 2025, arXiv 2412.00081; released code AntoAndGar/task_singular_vectors.  For a matrix with
r = min(m, n) and q = ⌊r / T⌋:

    U_t, S_t, V_t = q leading triplets of D_t
    update = polar([U_1 … U_T]) diag(S_1 … S_T) polar([V_1 … V_T])ᵀ

Everything that is no matrix: the mean of the D_t.  λ is chosen on validation data.

Unlike the release, a task whose D_t has fewer than q directions contributes no more than it has (LAPACK's completion of
a low-rank matrix would push the other tasks' directions aside), and q is at least 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.linalg.polar import polar
from subspace_lab.linalg.precision import matmul
from subspace_lab.linalg.thin_svd import top_k
from subspace_lab.merging.base import Stack
from subspace_lab.merging.spectral import SpectralMerge


class TSVMerge(SpectralMerge):
    """TSV-M.

    Args:
        solver: exact: triplets to float32's rounding; gram: from float32 Gram matrices, below 1e-3 relative, faster.
        scale: λ.
    """

    def __init__(self, solver: Literal["exact", "gram"] = "exact", scale: float = 1.0) -> None:
        super().__init__(scale)
        self.solver = solver

    @override
    def update(self, stack: Stack) -> Tensor:
        if stack.kind != "matrix":
            return stack.mean()
        q = max(1, min(stack.shape) // stack.models)
        D = stack.delta(0)
        U, V = (D.new_empty(len(D), size, q * stack.models) for size in stack.shape)
        values = []
        for t in range(stack.models):
            if t:
                D = stack.delta(t)
            place = slice(t * q, (t + 1) * q)
            U[..., place], S_t, V[..., place] = top_k(D, q, approximate=self.solver == "gram")
            values.append(S_t)
            del D
        S = torch.cat(values, dim=-1)
        return matmul(polar(U, overwrite=True).mul_(S.unsqueeze(-2)), polar(V, overwrite=True).mT)
