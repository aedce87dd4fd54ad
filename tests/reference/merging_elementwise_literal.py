"""Elementwise merges in NumPy, as their papers write them: whole models flat, nothing streamed, float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def task_arithmetic(base: Vector, models: list[Vector], scale: float) -> Vector:
    """θ_pre + λ Σ τ_t (arXiv 2212.04089, §3)."""
    new = base.copy()
    for model in models:
        new = new + scale * (model - base)
    return new


def ties(deltas: list[Vector], density: float, combine: str) -> Vector:
    """Algorithm 1 of arXiv 2306.01708 on flat task vectors; what is added to the base."""
    trimmed = []
    for delta in deltas:
        k = max(1, math.floor(density * len(delta)))
        threshold = np.sort(np.abs(delta))[-k]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0))
    elected = np.sign(sum(trimmed))
    merged = np.zeros_like(deltas[0])
    for p in range(len(merged)):
        agreeing = [delta[p] for delta in trimmed if np.sign(delta[p]) == elected[p] and delta[p] != 0]
        if agreeing:
            merged[p] = sum(agreeing) / (len(agreeing) if combine == "mean" else 1)
    return merged


def dare(deltas: list[Vector], dropped: list[NDArray[np.bool_]], p: float, rescale: str) -> Vector:
    """Eqs. 1 and 2 of arXiv 2311.03099 on one tensor, with given draws, summed; rescaling by p or by the L1 norm."""
    merged = np.zeros_like(deltas[0])
    for delta, gone in zip(deltas, dropped, strict=True):
        thin = (1 - gone) * delta
        if rescale == "probability":
            merged = merged + thin / (1 - p)
        else:
            merged = merged + thin * np.abs(delta).sum() / np.abs(thin).sum()
    return merged


def slerp(first: Vector, second: Vector, t: float) -> Vector:
    """Shoemake's formula on one tensor; a straight line where the two are nearly parallel."""
    cos = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    if abs(cos) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.acos(cos)
    arc: Vector = (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)
    return arc
