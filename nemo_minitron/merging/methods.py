"""The merge methods on one tensor of each model, in float32; sums over a whole tensor are taken in float64.

linear: https://arxiv.org/abs/2203.05482 (model soups), section 2. task_arithmetic: https://arxiv.org/abs/2212.04089,
section 2. slerp: Shoemake 1985. ties: https://arxiv.org/abs/2306.01708, section 4. dare_ties:
https://arxiv.org/abs/2311.03099, section 3.1, with the sign election of TIES. model_stock:
https://arxiv.org/abs/2403.19522, section 4. Tests hold each to a formula in float64 and to mergekit 0.1.4.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The nearer two directions are, the less is left of the sines that slerp divides by; mergekit's limit.
_COLLINEAR = 0.9995
_SMALLEST_NORM = 1e-8
_SMALLEST_PRODUCT = 1e-6  # of two norms, in model_stock
_SMALLEST_RESCALED = 1e-7

Mask = Callable[[int, torch.Size, float], Tensor]


@dataclass(frozen=True)
class Values:
    """What a method takes for one tensor.

    Attributes:
        weights, densities: one a model.
        t: of slerp, 0 is the first model and 1 the second.
        normalize: whether sums are divided by the weights in them.
        scale: factor of what is added to the base; mergekit calls it lambda.
        rescale: what a thinned difference is scaled by: "none", "density" (1 / density) or "l1" (so that the sum of its
            magnitudes stays).
        filter_wise: model_stock's angle by row, not by tensor.
        mask: which values DARE keeps of a model: (number of the model, shape, density) to bool.
    """

    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    t: float = 0.5
    normalize: bool = True
    scale: float = 1.0
    rescale: str = "none"
    filter_wise: bool = False
    mask: Mask | None = None


def linear(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """The weighted sum of the models, or mean; `base` is not read. All float32, of one shape, as is the result."""
    total = torch.zeros_like(models[0])
    for weight, model in zip(v.weights, models, strict=True):
        total.add_(model, alpha=weight)
    return total / math.fsum(v.weights) if v.normalize else total


def task_arithmetic(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """The base, and the weighted sum of the models' differences to it. All float32, of one shape."""
    assert base is not None
    return base + _mixed([model - base for model in models], v)


def ties(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """As `task_arithmetic`, of the largest values of each difference, and of those that have the sign of their sum."""
    assert base is not None
    thinned = [
        _rescaled(model - base, _largest(model - base, density), density, v.rescale)
        for model, density in zip(models, v.densities, strict=True)
    ]
    return base + _elected(thinned, v)


def dare_ties(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """As `ties`, of values of each difference that are drawn at random."""
    assert base is not None
    assert v.mask is not None
    thinned = []
    for number, (model, density) in enumerate(zip(models, v.densities, strict=True)):
        difference = model - base
        if density < 1:
            difference = _rescaled(difference, v.mask(number, difference.shape, density), density, v.rescale)
        thinned.append(difference)
    return base + _elected(thinned, v)


def slerp(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """From the first model to the second along the sphere; straight where the two point the same way, or opposite."""
    first, second = models
    cosine = _cosine(first, second)
    if abs(cosine) > _COLLINEAR:
        return (1 - v.t) * first + v.t * second
    angle = math.acos(cosine)
    here, there = math.sin((1 - v.t) * angle), math.sin(v.t * angle)
    return (here / math.sin(angle)) * first + (there / math.sin(angle)) * second


def model_stock(base: Tensor | None, models: Sequence[Tensor], v: Values) -> Tensor:
    """Between the base and the models' mean, the nearer to the mean the smaller the angles between the differences.

    With cos the mean over all pairs of models: t = n cos / (1 + (n - 1) cos), t * mean + (1 - t) * base.
    """
    assert base is not None
    rows = (-1, base.shape[-1]) if v.filter_wise and base.dim() > 1 else (1, -1)
    differences = [(model - base).reshape(rows) for model in models]
    pairs = [
        _row_cosines(one, other)
        for number, one in enumerate(differences)
        for other in differences[number + 1 :]
    ]
    cosine, count = torch.stack(pairs).mean(0), len(models)
    below = 1 + (count - 1) * cosine
    # Where the differences cancel out there is no such point; their mean is nearly the base then.
    share = torch.where(below.abs() < 1e-6, 0.0, count * cosine / below).float()[:, None]
    mean = sum(differences[1:], start=differences[0]) / count
    return base + (share * mean).reshape(base.shape)


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        merge: of one tensor.
        uses: the numbers that it reads.
        base: whether it needs a base.
        least, most: models beside the base.
        normalize, rescale: what it does where nothing is said, as mergekit 0.1.4.
    """

    merge: Callable[[Tensor | None, Sequence[Tensor], Values], Tensor]
    uses: tuple[str, ...] = ()
    base: bool = True
    least: int = 1
    most: int | None = None
    normalize: bool = False
    rescale: str = "none"


METHODS = {
    "linear": Method(linear, ("weight",), base=False, normalize=True),
    "task_arithmetic": Method(task_arithmetic, ("weight",)),
    "slerp": Method(slerp, ("t",), base=False, least=2, most=2),
    "ties": Method(ties, ("weight", "density"), normalize=True),
    "dare_ties": Method(dare_ties, ("weight", "density"), rescale="l1"),
    "model_stock": Method(model_stock, least=2),
}


def drawn(seed: int, name: str) -> Mask:
    """DARE's masks of one tensor: the same for the same seed, tensor and model, whatever was drawn before.

    Args:
        name: of the tensor.
    """

    def mask(number: int, shape: torch.Size, density: float) -> Tensor:
        digest = hashlib.sha256(f"{seed}\0{number}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(shape, generator=generator) < density

    return mask


def _mixed(differences: Sequence[Tensor], v: Values) -> Tensor:
    total = torch.zeros_like(differences[0])
    for weight, difference in zip(v.weights, differences, strict=True):
        total.add_(difference, alpha=weight)
    weights = math.fsum(v.weights)
    # Weights that cancel out are left as they are, as mergekit does.
    return total * (v.scale / (weights if v.normalize and abs(weights) >= 1e-8 else 1.0))


def _elected(differences: Sequence[Tensor], v: Values) -> Tensor:
    """The weighted sum of those values that have the sign of the sum of all (a sum of 0 counts as positive)."""
    weighted = [d * weight for d, weight in zip(differences, v.weights, strict=True)]
    positive = sum(weighted[1:], start=weighted[0]) >= 0
    total, weights = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for value, weight in zip(weighted, v.weights, strict=True):
        agrees = torch.where(positive, value > 0, value < 0)
        total += value * agrees
        weights += weight * agrees
    if v.normalize:
        total /= torch.where(weights == 0, 1.0, weights)
    return total * v.scale


def _largest(difference: Tensor, density: float) -> Tensor:
    """Which values are among the int(density * n) largest by magnitude."""
    if density >= 1:
        return torch.ones_like(difference, dtype=torch.bool)
    kept = torch.zeros(difference.numel(), dtype=torch.bool)
    # Of equal magnitudes at the cut topk takes others than mergekit, which sorts.
    order = torch.argsort(difference.abs().reshape(-1), descending=True)
    kept[order[: int(density * difference.numel())]] = True
    return kept.view(difference.shape)


def _rescaled(difference: Tensor, kept: Tensor, density: float, rescale: str) -> Tensor:
    thinned = difference * kept
    if rescale == "density" and density > 0:
        return thinned / density
    if rescale == "l1":
        before, after = (float(part.abs().sum(dtype=torch.float64)) for part in (difference, thinned))
        if min(before, after) >= _SMALLEST_RESCALED:
            return thinned * (before / after)
    return thinned


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (one, other)]
    product = float((one * other).sum(dtype=torch.float64))
    return product / math.prod(norm if norm > _SMALLEST_NORM else 1.0 for norm in norms)


def _row_cosines(one: Tensor, other: Tensor) -> Tensor:
    """float64 [rows], of two [rows, n]."""
    norms = torch.linalg.vector_norm(one, dim=1, dtype=torch.float64) * torch.linalg.vector_norm(
        other, dim=1, dtype=torch.float64
    )
    product = (one * other).sum(1, dtype=torch.float64)
    return (product / norms.clamp(min=_SMALLEST_PRODUCT)).clamp(-1, 1)
