"""Pruning in several steps of score and prune (arXiv 2407.14679, Table 12): sizes on the way, and one plan of all."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES, units_per_parent
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.plan import Kept, PrunePlan


def step_targets(
    source: Architecture, target: Architecture, iterations: int, *, layers_at_once: bool = False
) -> list[Architecture]:
    """The architecture after each step: sizes go from source to target in equal parts, as far as they are legal.

    They do not depend on the parallel layout, so that the plan does not either. An axis moves in multiples of the
    largest divisor that source and target share and that gives equal steps (or else lets every step change it), so
    most layouts that fit both also fit what is between; heads follow from the groups and the heads in each.

    Args:
        iterations: how many steps.
        layers_at_once: all layers that go, go in the first step: where they are listed.

    Raises:
        InputError: fewer than one step, or so many that one would change nothing.
    """
    if iterations < 1:
        raise InputError(f"iterations={iterations}: must be at least 1")
    targets = [source]
    for step in range(1, iterations + 1):

        def size(old: int, new: int, step: int = step) -> int:
            return _between(old, new, step, iterations)

        sizes = {a.name: size(a.size(source), a.size(target)) for a in AXES if a.parent is None}
        for a in AXES:
            if a.parent is not None:
                inside = size(units_per_parent(a, source), units_per_parent(a, target))
                sizes[a.name] = sizes[a.parent] * inside
        layers = target.num_layers if layers_at_once else size(source.num_layers, target.num_layers)
        targets.append(source.replace(**sizes, num_layers=layers))
        if targets[-1] == targets[-2]:
            raise InputError(
                f"iterations={iterations}: step {step} would change no size; fewer steps are possible"
            )
    return targets[1:]


def _between(old: int, new: int, step: int, steps: int) -> int:
    """Monotone in `step`, `new` at the last one."""
    common = math.gcd(old, new)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    equal = [d for d in divisors if (old - new) % (d * steps) == 0]
    roomy = [d for d in divisors if (old - new) // d >= steps]
    unit = max(equal or roomy or [1])
    # To the nearest unit; of two, the one that prunes less.
    parts = (old - new) // unit
    return old - unit * ((2 * parts * step + steps - 1) // (2 * steps))


def compose(plans: Sequence[PrunePlan]) -> PrunePlan:
    """One plan that does at once what the plans do one after the other; its indices are the first one's source's.

    Args:
        plans: at least one; each but the first is for the target of the one before, none has a head residual.

    Returns:
        A plan whose `scores` are the first plan's, with "steps": the architecture's sizes after each step.
    """
    whole = plans[0]
    for plan in plans[1:]:
        assert plan.source == whole.target, "the plans do not follow on one another"
        residual = whole.head_residual or plan.head_residual
        assert residual is None, "a residual is no selection"
        whole = dataclasses.replace(whole, target=plan.target, kept=_composed(whole, plan))
    if len(plans) == 1:
        return whole
    steps = [plan.target.to_dict() for plan in plans]
    sizes = [axis for axis in steps[0] if len({whole.source.to_dict()[axis], *(s[axis] for s in steps)}) > 1]
    how = {
        **whole.scores,
        "iterations": len(plans),
        "steps": [{axis: s[axis] for axis in sizes} for s in steps],
    }
    return dataclasses.replace(whole, scores=how)


def _composed(first: PrunePlan, then: PrunePlan) -> Kept:
    def by_layer(outer: list[list[int]] | None, inner: list[list[int]] | None) -> list[list[int]] | None:
        if outer is None:
            return inner
        kept = [outer[layer] for layer in then.source_layers]
        return (
            kept
            if inner is None
            else [[units[i] for i in chosen] for units, chosen in zip(kept, inner, strict=True)]
        )

    def listed(outer: list[int] | None, inner: list[int] | None) -> list[int] | None:
        return inner if outer is None else outer if inner is None else [outer[i] for i in inner]

    one, two = first.kept, then.kept
    width: dict[str, Any] = {
        axis.name: (by_layer if axis.per_layer else listed)(one.of(axis), two.of(axis)) for axis in AXES
    }
    return Kept(layers=listed(one.layers, two.layers), **width)
