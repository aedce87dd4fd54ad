"""Iterative nullspace projection (INLP): remove from features everything that linear classifiers can read of a label.

Ravfogel, Elazar, Gonen, Twiton & Goldberg, "Null It Out: Guarding Protected Attributes by Iterative Nullspace
Projection", ACL 2020. With W_i the weights of the i-th classifier, trained on features already projected:

    P = I − P_row(Σ_i P_row(W_i)),    features @ P

which is the orthogonal projector onto what all W_i map to zero.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Classifier = Literal["svm", "logistic"]

_NEGLIGIBLE = 1e-6  # rows of W dependent to this precision (those of a softmax sum to zero) are dependent


@dataclass(frozen=True)
class Erasure:
    """What INLP removed.

    Attributes:
        P: float64 (n, n) symmetric projector; apply as ``features @ P``.
        W: float64 (rows, n) weights of the kept classifiers, stacked; ‖W P‖ <= 1e-6 ‖W‖.
        accuracies: of every classifier on the held-out examples, in order; the last one is below the minimum unless the
            iterations ran out.
        removed: dimensions taken away, n − rank P.
    """

    P: Tensor
    W: Tensor
    accuracies: tuple[float, ...]
    removed: int


def inlp(
    features: Tensor,
    labels: Tensor,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    iterations: int = 35,
    min_accuracy: float | None = None,
    classifier: Classifier = "svm",
) -> Erasure:
    """Fit linear classifiers until one has nothing to go by, and project their directions out.

    Features should have comparable scales; they are used as they are. What a nonlinear classifier reads stays. Each
    classifier of C > 2 classes takes up to C dimensions. LEACE (package concept-erasure) does it in closed form with
    the smallest possible change.

    Args:
        features: (N, n) to train on, any floating type, any device.
        labels: int64 (N,), 0 or more.
        held_out: features (m, n) and labels (m,) on which accuracy is measured. Default: the training examples, with
            which it hardly falls while N is not many times n.
        iterations: classifiers at most.
        min_accuracy: a classifier below it is dropped and ends the search (another would be the same). Default: the
            share of the most frequent label + 0.01, which is the authors' 0.51 for two balanced classes.
        classifier: svm: scikit-learn's LinearSVC (the authors mostly use it, with balanced class weights, which we do
            not: the minimum is the majority's share); logistic: LogisticRegression. Both with C = 1.

    Returns:
        P and W on the device of ``features``; W has no rows and P is the identity if no classifier was kept.

    Raises:
        ValueError: features and labels do not fit, one class only, or iterations < 1.
    """
    if features.dim() != 2 or len(features) != len(labels) or iterations < 1:
        raise ValueError(f"inlp got features {tuple(features.shape)}, {len(labels)} labels, {iterations} iterations")
    x, y = features.detach().double().cpu(), labels.cpu()
    test_x, test_y = (x, y) if held_out is None else (held_out[0].detach().double().cpu(), held_out[1].cpu())
    if min_accuracy is None:
        min_accuracy = test_y.bincount().max().item() / len(test_y) + 0.01
    n = x.shape[1]
    P, U = torch.eye(n, dtype=x.dtype), x.new_zeros(n, 0)
    kept, accuracies = [x.new_zeros(0, n)], []
    for _ in range(iterations):
        W, accuracy = _fit(x @ P, y, test_x @ P, test_y, classifier)
        accuracies.append(accuracy)
        if accuracy < min_accuracy:
            break
        kept.append(W)
        # The range of a sum of projectors is the sum of their ranges: no classifier is projected out less than fully,
        # even if its weights are not quite orthogonal to what went before.
        U = _row_basis(torch.cat([U.mT, _row_basis(W).mT]))
        P = torch.eye(n, dtype=x.dtype) - U @ U.mT
        if U.shape[1] == n:
            break
    device = features.device
    return Erasure(P.to(device), torch.cat(kept).to(device), tuple(accuracies), U.shape[1])


def _row_basis(W: Tensor) -> Tensor:
    """Orthonormal basis (n, rank) of the rows of W (m, n)."""
    _, values, rows = torch.linalg.svd(W, full_matrices=False)
    rank = int((values > _NEGLIGIBLE * values[0]).sum()) if len(values) else 0
    basis: Tensor = rows[:rank].mT
    return basis


def _fit(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classifier: Classifier) -> tuple[Tensor, float]:
    """Weights (rows, n) of a classifier of x and its accuracy on test_x."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    model: Any = (
        LogisticRegression(max_iter=1000)
        if classifier == "logistic"
        else LinearSVC(dual=len(x) < x.shape[1], max_iter=10_000, random_state=0)
    )
    with warnings.catch_warnings():
        # A classifier stopped early reads less, and the next one reads the rest.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.coef_).double(), float(model.score(test_x.numpy(), test_y.numpy()))
