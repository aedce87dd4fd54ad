"""FedGP, FedDA and their automatic weights (Jiang, Zhang & Koyejo, ICLR 2024), one client after the other.

Slow on purpose: in numpy, tensor after tensor, variances as sums over vectors, no shared code with the package.
"""

from __future__ import annotations

import numpy as np

Vector = np.ndarray


def cosine(a: Vector, b: Vector) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def fedgp(target: list[Vector], sources: list[list[Vector]], shares: list[float], betas: list[float]) -> list[Vector]:
    """For every tensor: the target's gradient and its projections onto the sources' that agree with it."""
    out = []
    for t, g_T in enumerate(target):
        total = np.zeros_like(g_T)
        for source, share, beta in zip(sources, shares, betas, strict=True):
            g_S = source[t]
            projection = max(float(g_T @ g_S), 0.0) / float(g_S @ g_S) * g_S
            total = total + share * ((1 - beta) * g_T + beta * projection)
        out.append(total)
    return out


def fedgp_released(
    target: list[Vector],
    sources: list[list[Vector]],
    shares: list[float],
    betas: list[float],
    steps: list[int],
    steps_of_target: int,
) -> list[Vector]:
    """Cosines times the sources' updates, which are first brought to the target's number of steps."""
    out = []
    for t, g_T in enumerate(target):
        total = np.zeros_like(g_T)
        for source, share, beta, count in zip(sources, shares, betas, steps, strict=True):
            similarity = cosine(g_T, source[t])
            if similarity > 0:
                total = total + beta * (steps_of_target / count) * share * similarity * source[t]
            total = total + (1 - beta) * share * g_T
        out.append(total)
    return out


def fedda(target: list[Vector], sources: list[list[Vector]], shares: list[float], betas: list[float]) -> list[Vector]:
    """The convex combination."""
    return [
        sum(
            share * ((1 - beta) * g_T + beta * source[t])
            for source, share, beta in zip(sources, shares, betas, strict=True)
        )
        for t, g_T in enumerate(target)
    ]


def statistics(batches: list[Vector], source: Vector) -> dict[str, float]:
    """Unbiased estimates from N batch updates of the target and the mean update of a source."""
    N = len(batches)
    mean = sum(batches) / N
    sample_variance = sum(float(((u - mean) ** 2).sum()) for u in batches) / (N - 1)
    distance = max(sum(float(((u - source) ** 2).sum()) for u in batches) / N - sample_variance, 0.0)
    unit = source / np.linalg.norm(source)
    projected = [u - (u @ unit) * unit for u in batches]
    projected_mean = sum(projected) / N
    projected_variance = sum(float(((u - projected_mean) ** 2).sum()) for u in projected) / (N - 1)
    left = max(sum(float((u**2).sum()) for u in projected) / N - projected_variance, 0.0)
    positive = sum(float(u @ source) > 0 for u in batches) / N
    return {
        "variance": sample_variance / N,
        "distance": distance,
        "left": left,
        "delta": 1 - (1 - positive) / N,
        "length": float((mean**2).sum()),
    }


def beta_fedgp(batches: list[Vector], source: Vector) -> float:
    """σ² / (σ² + P²)."""
    found = statistics(batches, source)
    return found["variance"] / (found["variance"] + found["left"])


def beta_fedgp_released(batches: list[Vector], source: Vector) -> float:
    """σ² / (σ² + δ P² + (1 − δ) |u|²)."""
    found = statistics(batches, source)
    delta = found["delta"]
    return found["variance"] / (found["variance"] + delta * found["left"] + (1 - delta) * found["length"])


def beta_fedda(batches: list[Vector], source: Vector) -> float:
    """σ² / (σ² + d²)."""
    found = statistics(batches, source)
    return found["variance"] / (found["variance"] + found["distance"])
