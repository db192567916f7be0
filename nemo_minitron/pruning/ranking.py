"""Which units rank highest: from scores, or at random as the control. Ties go to the lower index."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError


def random_scores(source: Architecture, seed: int) -> dict[str, Tensor]:
    """Scores that mean nothing: uniform, for every axis, of the shapes that `importance.Scores` has.

    They depend on the seed and the source only: every axis is always drawn, in this order, so that the same
    seed ranks the same at every target.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {axis.name: axis.score_shape(source) for axis in AXES} | {"layers": (source.num_layers,)}
    return {axis: torch.rand(shape, generator=generator) for axis, shape in shapes.items()}


def top_k(scores: Tensor, k: int) -> list[int]:
    """The indices of the k highest of scores [n], ascending."""
    return sorted(ranked(scores)[:k])


def ranked(scores: Tensor) -> list[int]:
    """All indices of scores [n], the highest score first."""
    return torch.sort(scores, descending=True, stable=True).indices.tolist()


def top_heads(scores: Tensor, groups: Sequence[int], heads_per_group: int, k: int) -> list[int]:
    """The k best query heads inside each of `groups`, ascending.

    Args:
        scores: [heads] of one layer, global.
        groups: the kept query groups, ascending, source indices.
        heads_per_group: of the source.
        k: heads to keep in a group.
    """
    by_group = scores.view(-1, heads_per_group)
    return [group * heads_per_group + head for group in groups for head in top_k(by_group[group], k)]


def residual_pairs(scores: Tensor, groups: Sequence[int], heads_per_group: int, k: int) -> list[list[int]]:
    """The pairs (kept head, pruned head) of the head residual, for each group on its own.

    With the group's L heads ranked 1..L and K kept, head i takes in head 2K - i + 1 for i in [2K - L + 1, K]
    (arXiv 2407.14679 §2.2); where L > 2K, the pruned heads ranked below 2K are lost.
    """
    by_group, pairs = scores.view(-1, heads_per_group), []
    for group in groups:
        order = [group * heads_per_group + head for head in ranked(by_group[group])]
        first = max(1, 2 * k - heads_per_group + 1)
        pairs += [[order[i - 1], order[2 * k - i]] for i in range(first, k + 1)]
    return pairs


def explicit_layers(
    num_layers: int, keep: Sequence[int] | None = None, drop: Sequence[int] | None = None
) -> list[int] | None:
    """The kept layers, ascending, that lists of layers to keep or drop (0-based) mean; None without either.

    Raises:
        InputError: an index out of range or listed twice, a layer both kept and dropped, or neither where
            both lists are given, nothing kept.
    """
    for name, listed in (("keep_layers", keep), ("drop_layers", drop)):
        for index in listed or []:
            if type(index) is not int or not 0 <= index < num_layers:
                raise InputError(
                    f"{name}: {index!r} is out of range, the source's layers are 0 to {num_layers - 1}"
                )
        if (
            listed is not None
            and (twice := next((i for i in listed if list(listed).count(i) > 1), None)) is not None
        ):
            raise InputError(f"{name}: layer {twice} is listed twice")
    if keep is None and drop is None:
        return None
    kept = set(range(num_layers)) - set(drop or []) if keep is None else set(keep)
    if both := sorted(kept & set(drop or [])):
        raise InputError(f"layer {both[0]} is in keep_layers and in drop_layers")
    if drop is not None and (neither := sorted(set(range(num_layers)) - kept - set(drop))):
        raise InputError(
            f"layer {neither[0]} is neither in keep_layers nor in drop_layers; give one of the two lists"
        )
    if not kept:
        raise InputError("keep_layers, drop_layers: no layer is left")
    return sorted(kept)


def check_protected(num_layers: int, keep: int, protect_first: int, protect_last: int) -> None:
    """Known before any layer is scored.

    Raises:
        InputError: more layers have to go than are free to go.
    """
    drop, free = num_layers - keep, num_layers - protect_first - protect_last
    if min(protect_first, protect_last) < 0 or drop > free:
        raise InputError(
            f"num_layers={keep}: {drop} layers have to go, but protect_first={protect_first} and "
            f"protect_last={protect_last} leave {max(free, 0)} of {num_layers} to choose from"
        )


def least_important_dropped(
    scores: Mapping[str, Tensor],
    metric: str | None,
    num_layers: int,
    keep: int,
    *,
    contiguous: bool = False,
    protect_first: int = 0,
    protect_last: int = 0,
) -> list[int]:
    """The layers that stay when the least important ones (or the least important block of neighbours) go.

    Args:
        scores: "layers/<metric>" [num_layers], or for a block of n layers "blocks/<metric>/<n>" [num_layers -
            n + 1], by the block's first layer; the higher, the more important. `random_scores` has "layers"
            only (metric None).
        metric: such as "block_influence" or "lm_loss".
        num_layers: of the source.
        keep: how many layers stay.
        contiguous: drop neighbours only.
        protect_first: that many layers at the start never go.
        protect_last: that many layers at the end never go.

    Raises:
        InputError: scores without that metric, or too many protected layers.
    """
    check_protected(num_layers, keep, protect_first, protect_last)
    drop = num_layers - keep
    importance = -_layer_scores(scores, metric, drop if contiguous else None)
    if contiguous:
        start = protect_first + ranked(importance[protect_first : num_layers - protect_last - drop + 1])[0]
        return [i for i in range(num_layers) if not start <= i < start + drop]
    # Reversed, so that of equal layers the later one goes.
    candidates = importance[protect_first : num_layers - protect_last].flip(0)
    gone = {num_layers - protect_last - 1 - i for i in ranked(candidates)[:drop]}
    return [i for i in range(num_layers) if i not in gone]


def _layer_scores(scores: Mapping[str, Tensor], metric: str | None, block: int | None) -> Tensor:
    if metric is None:
        return scores["layers"]
    key = f"layers/{metric}" if block in (None, 1) else f"blocks/{metric}/{block}"
    if key not in scores:
        raise InputError(f"the scores hold no {key!r}; they hold {', '.join(sorted(scores)) or 'nothing'}")
    if bool(scores[key].isnan().any()):
        raise InputError(
            f"{key}: the scores hold NaN at {scores[key].isnan().nonzero()[0].tolist()} (first layer)"
        )
    return scores[key]
