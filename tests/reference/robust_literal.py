"""Krum, Multi-Krum, median, trimmed mean and Bulyan from the definitions in their papers, in numpy.

Slow on purpose: distances of vectors, sorting coordinate by coordinate, no shared code with the package.
"""

from __future__ import annotations

import numpy as np


def krum_scores(vectors: list[np.ndarray], f: int) -> list[float]:
    """Sum of squared distances to the p − f − 2 nearest others (Blanchard et al. 2017, section 3)."""
    p = len(vectors)
    scores = []
    for i in range(p):
        distances = sorted(float(((vectors[i] - vectors[j]) ** 2).sum()) for j in range(p) if j != i)
        scores.append(sum(distances[: max(p - f - 2, 1)]))
    return scores


def krum(vectors: list[np.ndarray], f: int) -> np.ndarray:
    """The vector with the least score."""
    return vectors[int(np.argmin(krum_scores(vectors, f)))]


def multi_krum(vectors: list[np.ndarray], f: int, m: int) -> np.ndarray:
    """The mean of the m vectors with the least scores."""
    order = np.argsort(krum_scores(vectors, f))[:m]
    return np.mean([vectors[i] for i in order], axis=0)


def median(vectors: list[np.ndarray]) -> np.ndarray:
    """Coordinate by coordinate."""
    return np.array([np.median([v[k] for v in vectors]) for k in range(len(vectors[0]))])


def trimmed_mean(vectors: list[np.ndarray], f: int) -> np.ndarray:
    """Without the f largest and the f smallest values of each coordinate (Yin et al. 2018, definition 2)."""
    out = []
    for k in range(len(vectors[0])):
        values = sorted(float(v[k]) for v in vectors)
        out.append(np.mean(values[f : len(values) - f]))
    return np.array(out)


def bulyan(vectors: list[np.ndarray], f: int) -> np.ndarray:
    """θ = p − 2 f choices by Krum, then the θ − 2 f values nearest to the median (El Mhamdi et al. 2018, section 4)."""
    left = list(vectors)
    theta = len(left) - 2 * f
    chosen = []
    for _ in range(theta):
        best = int(np.argmin(krum_scores(left, f)))
        chosen.append(left.pop(best))
    out = []
    for k in range(len(vectors[0])):
        values = [float(v[k]) for v in chosen]
        middle = float(np.median(values))
        values.sort(key=lambda value: abs(value - middle))
        out.append(np.mean(values[: theta - 2 * f]))
    return np.array(out)
