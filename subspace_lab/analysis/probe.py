"""A linear probe: how well a linear classifier of frozen features does on another task."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from subspace_lab.data.splits import Indices, stratified

Classifier = Literal["logistic", "svm"]
Features = npt.NDArray[np.floating[Any]]

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        accuracy: share of the test examples that are classified right.
        c: the chosen inverse strength of regularisation, scikit-learn's C.
        held_out_accuracy: of that C on the held-out part of the training examples, by which it was chosen.
        train_examples: used for training, the held-out part included.
        test_examples: how many.
        converged: the final fit ended before the limit on iterations.
    """

    accuracy: float
    c: float
    held_out_accuracy: float
    train_examples: int
    test_examples: int
    converged: bool


def linear_probe(
    train: Features,
    train_labels: Indices,
    test: Features,
    test_labels: Indices,
    *,
    classifier: Classifier = "logistic",
    grid: Sequence[float] = C_GRID,
    name: str = "",
) -> Probe:
    """Fit a linear classifier to features and return how well it does on others.

    Features are standardised by the mean and sd of those trained on. C is the value of `grid` with the best accuracy on
    a fifth of the training examples, held out by class in proportion (the smallest such C); the classifier is then
    fitted to all of them. Deterministic.

    The protocol of Kornblith, Shlens & Le, "Do Better ImageNet Models Transfer Better?", CVPR 2019: multinomial
    logistic regression by L-BFGS; theirs has 45 values of C. Table 3 of Wang, Li & Zhang (ICCV 2023) has a linear SVM.

    Args:
        train: (N, n).
        train_labels: (N,).
        test: (m, n).
        test_labels: (m,).
        classifier: logistic: multinomial logistic regression; svm: one linear SVM per class (squared hinge).
        grid: values of C.
        name: of the task, for the warning that it has not converged.
    """
    held_out = stratified(train_labels, int(HELD_OUT * len(train_labels)), "probe")
    if len(grid) == 1 or not held_out.any():
        best, score = grid[0], float("nan")
    else:
        parts = (train[~held_out], train_labels[~held_out], train[held_out], train_labels[held_out])
        scores = [_fit(*parts, classifier, c)[0] for c in grid]
        score, best = max(zip(scores, grid, strict=True), key=lambda found: (found[0], -found[1]))
    accuracy, converged = _fit(train, train_labels, test, test_labels, classifier, best)
    if not converged:
        warnings.warn(
            f"the probe {name} has not converged in {MAX_ITERATIONS} iterations, C={best:g}: read it with care",
            stacklevel=2,
        )
    return Probe(accuracy, best, score, len(train), len(test), converged)


def _fit(
    train: Features, train_labels: Indices, test: Features, test_labels: Indices, classifier: Classifier, c: float
) -> tuple[float, bool]:
    """Accuracy on `test`, and whether the fit to `train` converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    if len(np.unique(train_labels)) < 2:  # what scikit-learn refuses
        return float(np.mean(test_labels == train_labels[0])), True
    scaler = StandardScaler().fit(train)
    model: Any = (
        LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        if classifier == "logistic"
        else LinearSVC(C=c, dual=len(train) < train.shape[1], max_iter=MAX_ITERATIONS, random_state=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(scaler.transform(train), train_labels)
    return float(model.score(scaler.transform(test), test_labels)), bool(np.max(model.n_iter_) < MAX_ITERATIONS)
