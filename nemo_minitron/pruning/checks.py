"""What a plan must hold to: plans are read from files, so everything in them is checked."""

from typing import TYPE_CHECKING, Any

from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.target import check_target

if TYPE_CHECKING:
    from nemo_minitron.pruning.plan import PrunePlan


def check_plan(plan: "PrunePlan") -> None:
    """Refuse kept indices that do not fit the plan's source and target.

    Raises:
        InputError: names the key.
    """
    source, target, kept = plan.source, plan.target, plan.kept
    if not isinstance(plan.source_sha256, str):
        raise InputError(f"source_sha256: {plan.source_sha256!r} is no string")
    check_target(source, target)
    if _listed("kept.layers", kept.layers, source.num_layers, target.num_layers):
        _check_indices("kept.layers", kept.layers, source.num_layers, target.num_layers)
    for axis in AXES:
        key, units, old, new = f"kept.{axis.name}", kept.of(axis), axis.size(source), axis.size(target)
        if not _listed(key, units, old, new):
            continue
        if not axis.per_layer:
            _check_indices(key, units, old, new)
            continue
        _check_layers(key, units, target.num_layers)
        for layer, indices in enumerate(units):
            _check_indices(f"{key}[{layer}]", indices, old, new)
    if kept.num_attention_heads is not None:
        for layer, heads in enumerate(kept.num_attention_heads):
            _check_heads(plan, layer, heads)
    if plan.head_residual is not None:
        _check_residual(plan)


def _listed(key: str, value: Any, old: int, new: int) -> bool:
    if value is None and old != new:
        raise InputError(f"{key}: null leaves the axis alone, but the target has {new} of {old}")
    return value is not None


def _check_layers(key: str, lists: Any, count: int) -> None:
    if not isinstance(lists, list) or len(lists) != count:
        found = f"{len(lists)} lists" if isinstance(lists, list) else repr(lists)
        raise InputError(f"{key}: must hold one list for each of the {count} kept layers, holds {found}")


def _check_indices(key: str, indices: Any, old: int, new: int) -> None:
    if not isinstance(indices, list) or len(indices) != new:
        found = f"{len(indices)}" if isinstance(indices, list) else repr(indices)
        raise InputError(f"{key}: must list the {new} indices that the target keeps, lists {found}")
    last = -1
    for index in indices:
        if type(index) is not int or not 0 <= index < old:
            raise InputError(f"{key}: {index!r} is no index of the source's {old}")
        if index <= last:
            raise InputError(f"{key}: {index} after {last}, indices must ascend")
        last = index


def _check_heads(plan: "PrunePlan", layer: int, heads: list[int]) -> None:
    groups = plan.kept.num_query_groups
    kept = list(range(plan.source.num_query_groups)) if groups is None else groups[layer]
    expected = [group for group in kept for _ in range(plan.target.heads_per_group)]
    if [head // plan.source.heads_per_group for head in heads] != expected:
        raise InputError(
            f"kept.num_attention_heads[{layer}]: every kept query group must keep "
            f"{plan.target.heads_per_group} heads"
        )


def _check_residual(plan: "PrunePlan") -> None:
    per_group, kept = plan.source.heads_per_group, plan.kept.num_attention_heads
    if kept is None:
        raise InputError("head_residual: no heads are pruned")
    assert plan.head_residual is not None
    _check_layers("head_residual", plan.head_residual, plan.target.num_layers)
    for layer, pairs in enumerate(plan.head_residual):
        key, used = f"head_residual[{layer}]", set()
        if not isinstance(pairs, list):
            raise InputError(f"{key}: must be a list of pairs")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or any(type(head) is not int for head in pair):
                raise InputError(f"{key}: {pair!r} is no pair of heads")
            head, pruned = pair
            if head not in kept[layer] or head in used:
                raise InputError(f"{key}: {head} is no kept head, or is there twice")
            if pruned in kept[layer] or pruned // per_group != head // per_group:
                raise InputError(f"{key}: {pruned} is no pruned head of the group of head {head}")
            used.add(head)
