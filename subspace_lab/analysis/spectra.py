"""Spectra of weights, gradients and features: effective ranks, nuclear norms, power laws, similarity.

Every function takes the matrix itself, any floating type, computes in float64 on its device and returns float64.
Leading dimensions are a batch. Rows are examples where a function speaks of features. Singular values σ_1 >= σ_2 >= …,
eigenvalues λ_i = σ_i². torch.linalg's decompositions synchronise on CUDA: for reports, not for the step path.

`subspace_lab.analysis.features` has RankMe and the stable rank, `subspace_lab.linalg` the principal angles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision


class PowerLaw(NamedTuple):
    """A fit λ_i ∝ i^−alpha.

    Attributes:
        alpha: (...) exponent.
        r2: (...) coefficient of determination of ln λ with the weights and over the indices of the fit. (The code that
            came with α-ReQ prints one over a longer range, up to index 500.)
    """

    alpha: Tensor
    r2: Tensor


def effective_rank(A: Tensor) -> Tensor:
    """exp(−Σ p ln p), p = σ / Σσ: 1 … min(p, q), and k for k equal singular values; nan for a zero matrix.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007. Without RankMe's + 1e-7, and not centred: subtract the mean of
    features first if it should not count (a large mean makes every set of features look like rank 1).

    Args:
        A: (..., p, q).

    Returns:
        (...).
    """
    return _exp_entropy(_singular_values(A))


def participation_ratio(A: Tensor) -> Tensor:
    """(Σλ)² / Σλ² = ‖A‖_F⁴ / ‖AᵀA‖_F²: 1 … min(p, q), and k for k equal singular values; nan for a zero matrix.

    Of the squared singular values, so large ones count for more than in `effective_rank`; for the dimension of a cloud
    of features give them centred. No decomposition, no synchronisation.

    Args:
        A: (..., p, q).

    Returns:
        (...).
    """
    A = A.double()
    gram = A @ A.mT if A.shape[-2] < A.shape[-1] else A.mT @ A
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum(dim=(-2, -1))


def rankme_eigenvalues(features: Tensor) -> Tensor:
    """exp(−Σ p ln p), p = λ / Σλ with the eigenvalues λ of the *centred covariance* of features (..., N, n).

    The figure that reptrix and the eigenspectrum scripts of the α-ReQ authors call RankMe, and the one of "Tracing the
    Representation Geometry of Language Models" (2025). It is not RankMe (`features.rankme`: singular values, not
    centred): for σ_i ∝ i^−½, n = 512, this one is 117 and RankMe 410. Never compare the two.

    Returns:
        (...); nan if all examples are equal.
    """
    return _exp_entropy(_singular_values(_centred(features)).square())


def alpha_req(features: Tensor, *, first: int = 11, last: int = 100) -> PowerLaw:
    """Decay λ_i ∝ i^−alpha of the covariance eigenvalues of features (..., N, n), and how well it fits.

    Agrawal, Mondal, Ghosh & Richards, "α-ReQ: Assessing Representation Quality in Self-Supervised Learning by measuring
    eigenspectrum decay", NeurIPS 2022: alpha near 1 goes with good transfer; above 1 few directions carry everything.
    Least squares of ln λ_i on ln i with weights 1 / i over i = first … last, counted from 1. Read alpha only where R²
    is near 1: the fit has no meaning for a spectrum that is not a power law.

    Args:
        features: (..., N, n).
        first: first index of the fit.
        last: last index, at most min(N − 1, n), beyond which a centred matrix has no eigenvalues.

    Raises:
        ValueError: fewer than two eigenvalues to fit, so that no slope exists.
    """
    rows, columns = features.shape[-2:]
    last = min(last, rows - 1, columns)
    if not 1 <= first < last:
        raise ValueError(f"no slope between eigenvalues {first} and {last} of features {rows} × {columns}")
    values = _singular_values(_centred(features)).square()[..., first - 1 : last]
    index = torch.arange(first, last + 1, dtype=torch.float64, device=features.device)
    weight = 1 / (index * (1 / index).sum())
    x, y = index.log(), values.log()
    x = x - (weight * x).sum()
    y = y - (weight * y).sum(-1, keepdim=True)
    slope = (weight * x * y).sum(-1) / (weight * x.square()).sum()
    rest = (weight * (y - slope.unsqueeze(-1) * x).square()).sum(-1)
    return PowerLaw(-slope, 1 - rest / (weight * y.square()).sum(-1))


def nuclear_norm(A: Tensor) -> Tensor:
    """Σσ of A (..., p, q), as (...)."""
    return _singular_values(A).sum(-1)


def unit_rows(features: Tensor) -> Tensor:
    """Features (..., N, n) minus their mean row, each row then of length 1 (0 if nothing is left): what MNN is of."""
    centred = _centred(features)
    length = centred.norm(dim=-1, keepdim=True)
    return centred / torch.where(length > 0, length, torch.ones_like(length))


def matrix_nuclear_norm(features: Tensor) -> Tensor:
    """MNN: the sum of the min(N, n) largest column norms of `unit_rows`(features), divided by N.

    Li, Zhang, Li, Chang & Wu, "Large Language Model Evaluation via Matrix Nuclear-Norm", 2024: an O(N n) stand-in for
    the nuclear norm per token, `nuclear_norm(unit_rows(features)) / N`. It is exact in the principal basis only and
    depends on the basis elsewhere: 0.92 of the true norm for a Gaussian 512 × 768, 7 times too large for rank 8, which
    it ranks *above* the Gaussian. Report the true norm beside it.

    Args:
        features: (..., N, n): N tokens.

    Returns:
        (...).
    """
    rows, columns = features.shape[-2:]
    norms = unit_rows(features).norm(dim=-2)
    mnn: Tensor = norms.topk(min(rows, columns), dim=-1).values.sum(-1) / rows
    return mnn


def hill_alpha(W: Tensor) -> Tensor:
    """Heavy-tail exponent of the eigenvalue density of WᵀW: α = 1 + n / Σ ln(λ_j / λ_min) over the upper half.

    The tail begins at the median, λ_min is its smallest and n its number of eigenvalues, λ_min included (Zhou et al.,
    "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training", NeurIPS 2023, after Hill 1975 and
    Martin & Mahoney): smaller is heavier-tailed, near 2 is called well trained. They want at least 50 eigenvalues.

    It depends on the aspect ratio of W: 2.1, 2.7, 3.5 and 5.9 for *untrained* Gaussian 256 × 256, 512, 1024 and 4096.
    Between layers of different shape compare `farms_alpha`. A convolution's weight is (out, in·h·w) here.

    Args:
        W: (..., p, q).

    Returns:
        (...); nan if the median eigenvalue is 0 (rank below half).
    """
    return _hill(_singular_values(W).square())


def farms_alpha(W: Tensor, *, size: int = 100, ratio: float = 1.0, windows: int = 9) -> Tensor:
    """`hill_alpha` of the pooled eigenvalues of windows of one aspect ratio: comparable between layers of any shape.

    Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias" (FARMS), ICML 2025: windows at
    equal strides from the upper left, theirs for CIFAR-100 are 100 × 100, 9 along each side. For a Gaussian W it is 2.1
    whatever the shape. It looks at sub-matrices only: structure that is spread over all rows may escape it.

    Args:
        W: (..., p, q).
        size: rows of a window; fewer where W is too small for it, at the same ratio.
        ratio: columns per row of a window.
        windows: along each side, at least 2 (fewer where W is hardly larger than a window).

    Returns:
        (...).

    Raises:
        ValueError: windows < 2, or no window of this ratio fits.
    """
    p, q = W.shape[-2:]
    rows = min(size, p, int(q / ratio))
    columns = min(int(rows * ratio), q)
    if windows < 2 or rows < 1 or columns < 1:
        raise ValueError(f"cannot place {windows} windows a side of ratio {ratio:g} in {p} × {q}")
    down, right = (max(1, room // (windows - 1)) for room in (p - rows, q - columns))
    placed = W.unfold(-2, rows, down).unfold(-2, columns, right)[..., :windows, :windows, :, :]
    return _hill(_singular_values(placed).square().flatten(-3))


@full_precision
def linear_cka(X: Tensor, Y: Tensor) -> Tensor:
    """‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of centred X and Y: similarity of two representations of the same examples, 0 … 1.

    Kornblith, Norouzi, Lee & Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019. Unchanged by
    rotations and one scale of either side, not by other linear maps. Biased upwards for few examples: two independent
    Gaussian sets of N = n examples score about 1/2.

    Args:
        X: (..., N, n).
        Y: (..., N, m): the same examples in the same order.

    Returns:
        (...); nan if all examples of one side are equal.

    Raises:
        ValueError: different numbers of examples.
    """
    if X.shape[-2] != Y.shape[-2]:
        raise ValueError(f"linear_cka needs the same examples on both sides, got {X.shape[-2]} and {Y.shape[-2]}")
    X, Y = _centred(X), _centred(Y)
    if X.shape[-2] < max(X.shape[-1], Y.shape[-1]):
        K, L = X @ X.mT, Y @ Y.mT
        shared, alone = (K * L).sum(dim=(-2, -1)), _frobenius(K) * _frobenius(L)
    else:
        shared, alone = (Y.mT @ X).square().sum(dim=(-2, -1)), _frobenius(X.mT @ X) * _frobenius(Y.mT @ Y)
    similarity: Tensor = shared / alone
    return similarity


def _singular_values(A: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(A.double())
    return values


def _exp_entropy(values: Tensor) -> Tensor:
    p = values / values.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(p).sum(-1).exp()
    return rank


def _centred(features: Tensor) -> Tensor:
    double = features.double()
    return double - double.mean(dim=-2, keepdim=True)


def _frobenius(A: Tensor) -> Tensor:
    norm: Tensor = A.square().sum(dim=(-2, -1)).sqrt()
    return norm


def _hill(values: Tensor) -> Tensor:
    """1 + n / Σ ln(λ / λ_min) over the upper half of eigenvalues (..., m), in any order."""
    ordered = values.sort(dim=-1).values
    tail = ordered[..., ordered.shape[-1] // 2 :]
    alpha: Tensor = 1 + tail.shape[-1] / (tail / tail[..., :1]).log().sum(-1)
    return alpha
