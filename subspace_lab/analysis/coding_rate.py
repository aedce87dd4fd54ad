"""MCR²: how many nats it takes to code features together, and how many fewer class by class.

Yu, Chan, You, Song & Ma, "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
Reduction", NeurIPS 2020. With Z (n, d) (theirs transposed: rows are examples) and Π_j the diagonal of memberships in j:

    R(Z)       = ½ ln det(I + d / (n ε²) ZᵀZ)
    R_c(Z, Π)  = Σ_j tr Π_j / (2n) · ln det(I + d / (tr Π_j ε²) Zᵀ Π_j Z)
    ΔR         = R − R_c,  >= 0 whenever the memberships of each example sum to 1 (ln det is concave)

All three are differentiable, stay on the device and are computed in float32 (float64 for float64). They grow without
limit with the scale of Z: compare and maximise them on rows of length 1 only. The authors' script trains with ε² = 0.5
(its class defaults to 0.01: the figures are not comparable).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from subspace_lab.linalg.precision import full_precision, matmul, upcast


@full_precision
def coding_rate(Z: Tensor, *, eps2: float = 0.5) -> Tensor:
    """R(Z) in nats.

    Args:
        Z: (..., n, d), rows are examples, meant to have length 1.
        eps2: ε², the squared error allowed per example.

    Returns:
        (...), 0 or more.
    """
    Z = upcast(Z)
    n, d = Z.shape[-2:]
    # det(I + c ZᵀZ) = det(I + c ZZᵀ): the smaller one.
    gram = matmul(Z, Z.mT) if n < d else matmul(Z.mT, Z)
    return _log_det(d / (n * eps2) * gram) / 2


@full_precision
def class_coding_rate(Z: Tensor, membership: Tensor, *, eps2: float = 0.5) -> Tensor:
    """R_c(Z, Π) in nats, a scalar; classes without examples add nothing.

    Work space is classes × d × (n + d).

    Args:
        Z: (n, d), rows are examples, meant to have length 1.
        membership: int64 (n,) labels 0, 1, … (which synchronises, for their number), or floating (n, classes) >= 0,
            rows summing to 1 if ΔR >= 0 is wanted.
        eps2: ε².

    Raises:
        ValueError: memberships of another number of examples.
    """
    Z = upcast(Z)
    if membership.dim() == 1:
        membership = one_hot(membership)
    if membership.dim() != 2 or len(membership) != len(Z):
        raise ValueError(f"memberships {tuple(membership.shape)} do not fit {len(Z)} examples")
    shares = membership.to(Z.dtype)
    total = shares.sum(0)
    n, d = Z.shape
    gram = matmul(Z.mT, shares.mT.unsqueeze(-1) * Z)  # (classes, d, d)
    scale = d / (eps2 * total.clamp(min=torch.finfo(Z.dtype).tiny ** 0.5))
    return (total * _log_det(scale[:, None, None] * gram)).sum() / (2 * n)


def rate_reduction(Z: Tensor, membership: Tensor, *, eps2: float = 0.5) -> Tensor:
    """ΔR = R − R_c in nats, a scalar to maximise; arguments as in `class_coding_rate`."""
    return coding_rate(Z, eps2=eps2) - class_coding_rate(Z, membership, eps2=eps2)


def _log_det(A: Tensor) -> Tensor:
    """Ln det(I + A) of symmetric positive semi-definite A (..., m, m), without synchronisation."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    factor, _ = torch.linalg.cholesky_ex(identity + A, check_errors=False)
    found: Tensor = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return found
