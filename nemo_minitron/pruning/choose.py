"""Choosing what stays: a plan from scores, or from random ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES, BY_NAME, Axis, units_per_parent
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import ranking
from nemo_minitron.pruning.plan import Kept, PrunePlan
from nemo_minitron.pruning.target import check_target

if TYPE_CHECKING:
    from nemo_minitron.importance.scores import Scores


def make_plan(
    source: Architecture,
    target: Architecture,
    scores: "Scores | None" = None,
    *,
    importance: Literal["activation", "random"] = "activation",
    seed: int = 0,
    source_sha256: str,
    keep_layers: Sequence[int] | None = None,
    drop_layers: Sequence[int] | None = None,
    layer_metric: str = "block_influence",
    contiguous: bool = False,
    protect_first: int = 0,
    protect_last: int = 0,
    head_residual: bool = False,
) -> PrunePlan:
    """Choose the units of `source` that stay: the highest scores; the same inputs always give the same plan.

    `hidden_size` is chosen once for the whole network, the other width axes layer by layer (arXiv 2407.14679
    §2.2): whole query groups first, then the best heads inside each kept group, so that all groups keep the
    same number. An axis of which source and target have the same size is left alone.

    Args:
        source: the scored model's architecture.
        target: what to make of it.
        scores: of `source`; not needed for random importance, nor where an explicit list of layers is all
            there is.
        importance: "activation" ranks by `scores`; "random" ranks by `seed` and nothing else, as the control.
        seed: for random importance.
        source_sha256: digest of the source checkpoint.
        keep_layers: explicit layers to keep, 0-based.
        drop_layers: explicit layers to drop, 0-based.
        layer_metric: which layer scores to use where the layers are not listed.
        contiguous: drop one block of neighbouring layers.
        protect_first: number of first layers that are never dropped (listed ones apart).
        protect_last: number of last layers that are never dropped (listed ones apart).
        head_residual: let kept heads take in pruned ones (see `PrunePlan.head_residual`).

    Raises:
        InputError: a target that `source` cannot be pruned to; layers listed wrongly; scores of another
            model, or without an axis that is needed, or with NaN.
    """
    check_target(source, target)
    if scores is not None:
        scores.check_matches(source, source_sha256)
    how, tensors, metric = _importance(source, scores, importance, seed, layer_metric)
    layers = ranking.explicit_layers(source.num_layers, keep_layers, drop_layers)
    if layers is not None:
        how["layers"] = "listed"
    elif target.num_layers != source.num_layers:
        limits: dict[str, Any] = {"contiguous": contiguous}
        limits |= {"protect_first": protect_first, "protect_last": protect_last}
        counts = (source.num_layers, target.num_layers)
        layers = ranking.least_important_dropped(tensors, metric, *counts, **limits)
        how |= limits | ({"layer_metric": metric} if metric else {})
    if layers is not None and len(layers) != target.num_layers:
        raise InputError(f"num_layers={target.num_layers}: but the listed layers keep {len(layers)}")
    kept = _choose_width(source, target, tensors, None if layers == [*range(source.num_layers)] else layers)
    residual = _residual(source, target, tensors, kept) if head_residual else None
    return PrunePlan(source_sha256, source, target, how, kept, residual)


def _importance(
    source: Architecture, scores: "Scores | None", importance: str, seed: int, layer_metric: str
) -> tuple[dict[str, Any], Mapping[str, Tensor], str | None]:
    """How the units are chosen, for the record; the scores; the name of the layer metric, None for random."""
    if importance == "random":
        return {"importance": "random", "seed": seed}, ranking.random_scores(source, seed), None
    if importance != "activation":
        raise InputError(f"importance={importance!r}: must be activation or random")
    if scores is None:
        return {"importance": "activation"}, {}, layer_metric
    made = ("batch", "sequence", "samples", "tokens", "data_sha256")
    return {"importance": "activation", **{n: getattr(scores, n) for n in made}}, scores.tensors, layer_metric


def _choose_width(
    source: Architecture, target: Architecture, scores: Mapping[str, Tensor], layers: list[int] | None
) -> Kept:
    kept_layers = range(source.num_layers) if layers is None else layers
    chosen: dict[str, Any] = {}
    for axis in sorted(AXES, key=lambda axis: axis.parent is not None):  # parents first
        size = axis.size(target)
        if size == axis.size(source):
            continue
        if axis.parent is not None:
            chosen[axis.name] = _choose_inside(axis, source, target, scores, chosen, kept_layers)
        elif axis.per_layer:
            by_layer = _axis(scores, axis.name)
            chosen[axis.name] = [ranking.top_k(by_layer[layer], size) for layer in kept_layers]
        else:
            chosen[axis.name] = ranking.top_k(_axis(scores, axis.name), size)
    return Kept(layers, **chosen)


def _choose_inside(
    axis: Axis,
    source: Architecture,
    target: Architecture,
    scores: Mapping[str, Tensor],
    chosen: Mapping[str, Any],
    layers: Sequence[int],
) -> list[list[int]]:
    """The units of an axis that stay inside the kept units of its parent (`chosen`), by kept layer."""
    assert axis.parent is not None
    old, new = units_per_parent(axis, source), units_per_parent(axis, target)
    everyone = list(range(BY_NAME[axis.parent].size(source)))
    parents = chosen.get(axis.parent, [everyone] * len(layers))
    if old == new:  # Only whole parents go, nothing inside them is ranked.
        return [[parent * old + unit for parent in kept for unit in range(old)] for kept in parents]
    by_layer = _axis(scores, axis.name)
    return [ranking.top_heads(by_layer[layer], parents[i], old, new) for i, layer in enumerate(layers)]


def _residual(
    source: Architecture, target: Architecture, scores: Mapping[str, Tensor], kept: Kept
) -> list[list[list[int]]]:
    if target.heads_per_group == source.heads_per_group:
        raise InputError("head_residual: no query group loses heads, there is nothing to take in")
    by_layer, everyone = _axis(scores, "num_attention_heads"), list(range(source.num_query_groups))
    layers = range(source.num_layers) if kept.layers is None else kept.layers
    return [
        ranking.residual_pairs(
            by_layer[layer],
            everyone if kept.num_query_groups is None else kept.num_query_groups[i],
            source.heads_per_group,
            target.heads_per_group,
        )
        for i, layer in enumerate(layers)
    ]


def _axis(scores: Mapping[str, Tensor], axis: str) -> Tensor:
    if axis not in scores:
        raise InputError(f"{axis}: the scores hold none; they hold {', '.join(sorted(scores)) or 'nothing'}")
    values = scores[axis]
    if bool(values.isnan().any()):
        raise InputError(
            f"{axis}: the scores hold NaN at {values.isnan().nonzero()[0].tolist()} (layer, unit)"
        )
    return values
