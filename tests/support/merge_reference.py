"""The merge methods' formulas in float64 numpy, written from the papers: no code of the package."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def linear(models: list[Array], weights: list[float], normalize: bool = True) -> Array:
    total = sum(w * m for w, m in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total


def task_arithmetic(base: Array, models: list[Array], weights: list[float]) -> Array:
    """arXiv 2212.04089: theta + sum of lambda tau."""
    return base + sum(w * (m - base) for w, m in zip(weights, models, strict=True))


def slerp(first: Array, second: Array, t: float) -> Array:
    a, b = first.ravel(), second.ravel()
    omega = np.arccos(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
    return (np.sin((1 - t) * omega) * first + np.sin(t * omega) * second) / np.sin(omega)


def trimmed(difference: Array, density: float) -> Array:
    """The int(density * n) largest magnitudes, by sorting."""
    flat = difference.ravel().copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[int(density * flat.size) :]] = 0
    return flat.reshape(difference.shape)


def elected(differences: list[Array], weights: list[float], normalize: bool) -> Array:
    """arXiv 2306.01708, steps 2 and 3, value by value."""
    shape = differences[0].shape
    stacked = np.stack([d.ravel() for d in differences])
    merged = np.zeros(stacked.shape[1])
    for column in range(stacked.shape[1]):
        parts = [(w * d, w) for w, d in zip(weights, stacked[:, column], strict=True)]
        sign = 1 if sum(p for p, _ in parts) >= 0 else -1
        agreeing = [(p, w) for p, w in parts if p * sign > 0]
        if agreeing:
            divisor = sum(w for _, w in agreeing) if normalize else 1.0
            merged[column] = sum(p for p, _ in agreeing) / divisor
    return merged.reshape(shape)


def ties(base: Array, models: list[Array], weights: list[float], densities: list[float]) -> Array:
    thinned = [trimmed(m - base, d) for m, d in zip(models, densities, strict=True)]
    return base + elected(thinned, weights, normalize=True)


def dare_ties(
    base: Array,
    models: list[Array],
    weights: list[float],
    densities: list[float],
    masks: list[Array],
    rescale: str,
) -> Array:
    """arXiv 2311.03099, of given masks: kept values / density, or by the sum of magnitudes ("l1") as in mergekit."""
    thinned = []
    for model, density, mask in zip(models, densities, masks, strict=True):
        kept = (model - base) * mask
        by = 1 / density if rescale == "density" else np.abs(model - base).sum() / np.abs(kept).sum()
        thinned.append(kept * by)
    return base + elected(thinned, weights, normalize=False)


def model_stock(base: Array, models: list[Array], by_row: bool = False) -> Array:
    """arXiv 2403.19522, equation 4, with the mean of the cosines of all pairs."""
    if by_row and base.ndim > 1:
        rows = [model_stock(base[i], [m[i] for m in models]) for i in range(len(base))]
        return np.stack(rows)
    differences = [(m - base).ravel() for m in models]
    cosines = [
        a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
        for i, a in enumerate(differences)
        for b in differences[i + 1 :]
    ]
    cosine, n = float(np.mean(cosines)), len(models)
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * np.mean(models, axis=0) + (1 - t) * base
