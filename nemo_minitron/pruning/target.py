"""Which architectures a model can be pruned to, and the target that a preset's sizes mean."""

import dataclasses
import math
import re
from collections.abc import Mapping
from fractions import Fraction

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES, PRUNABLE
from nemo_minitron.config.trainer import common_divisors
from nemo_minitron.errors import InputError

# Sizes that fractions give are kept on matrix-multiply tiles, but never coarser than a 16th of the source.
_LARGEST_MULTIPLE, _FINEST_STEP = 128, 16


def check_target(
    source: Architecture, target: Architecture, *, tp: int = 1, pp: int = 1, vp: int | None = None
) -> None:
    """Refuse a target that `source` cannot be pruned to under the given layout.

    Args:
        source: the model to prune.
        target: the model to make.
        tp: tensor-parallel size.
        pp: pipeline-parallel size (stages).
        vp: virtual pipeline stages a rank (None: no interleaving).

    Raises:
        InputError: names the size and what would be legal.
    """
    _check_same_elsewhere(source, target)
    for axis in PRUNABLE:
        if getattr(target, axis) > getattr(source, axis):
            raise InputError(
                f"{axis}={getattr(target, axis)}: larger than the source's {getattr(source, axis)}"
            )
    if target.heads_per_group > source.heads_per_group:
        raise InputError(
            f"num_attention_heads={target.num_attention_heads}, num_query_groups={target.num_query_groups}: "
            f"{target.heads_per_group} heads a group, more than the source's {source.heads_per_group}"
        )
    _check_tensor_parallel(target, tp)
    if target.num_layers != source.num_layers:
        _check_stages(target.num_layers, pp, vp)


def _check_same_elsewhere(source: Architecture, target: Architecture) -> None:
    for field in dataclasses.fields(Architecture):
        ours, wanted = getattr(source, field.name), getattr(target, field.name)
        if field.name not in PRUNABLE and ours != wanted:
            raise InputError(
                f"{field.name}={wanted!r}: pruning keeps the source's {ours!r} "
                f"and changes {', '.join(PRUNABLE)} only"
            )


def _check_tensor_parallel(target: Architecture, tp: int) -> None:
    sharded = [axis for axis in reversed(AXES) if axis.sharded]
    legal = common_divisors([axis.size(target) for axis in sharded])
    for axis in sharded:
        name, size = axis.name, axis.size(target)
        if size < tp:
            problem = f"leaves {tp - size} of {tp} tensor-parallel ranks empty"
        elif size % tp:
            problem = f"not divisible by tensor_model_parallel_size={tp}"
        else:
            continue
        raise InputError(
            f"{name}={size}: {problem}; tensor_model_parallel_size can be {legal} for these sizes"
        )


def _check_stages(num_layers: int, pp: int, vp: int | None) -> None:
    stages = pp * (vp or 1)
    what = f"pipeline_model_parallel_size={pp}" + (f" x virtual {vp}" if vp else "")
    if num_layers < stages:
        raise InputError(
            f"num_layers={num_layers}: leaves {stages - num_layers} of {stages} stages empty ({what})"
        )
    if num_layers % stages:
        raise InputError(f"num_layers={num_layers}: not divisible by the stages of {what}")


def resolve_target(
    source: Architecture, sizes: Mapping[str, int | float | str | None], multiple_of: int | None = None
) -> Architecture:
    """The target that sizes or fractions of the source's sizes mean.

    Args:
        source: the model to prune.
        sizes: by axis (the width axes and num_layers) an absolute size (int), a fraction of the source's (a
            float in (0, 1] or a string such as "9/14"), or None to leave it alone. Fractions are rounded to
            the nearest legal size: hidden_size and ffn_hidden_size to a multiple of the largest power of two
            up to 128 that divides the source's size with at least 16 steps, heads to a multiple of the
            groups. Groups that follow from the heads need not be given, and the other way round.
        multiple_of: what fractions of hidden_size and ffn_hidden_size are rounded to instead.

    Raises:
        InputError: an unknown axis, an invalid size or fraction, a target that cannot be made from the
            source, a multiple that is larger than the source's size.
    """
    for axis in sizes:
        if axis not in PRUNABLE:
            raise InputError(f"{axis}: no axis that can be pruned; those are {', '.join(PRUNABLE)}")
    wanted = {axis: value for axis, value in sizes.items() if value is not None}
    resolved: dict[str, int] = {
        axis.name: _size(
            axis.name,
            wanted[axis.name],
            axis.size(source),
            _multiple(axis.name, axis.size(source), multiple_of),
        )
        for axis in AXES
        if axis.tiled and axis.name in wanted
    }
    if "num_layers" in wanted:
        resolved["num_layers"] = _size("num_layers", wanted["num_layers"], source.num_layers, 1)
    target = source.replace(**resolved, **_heads_and_groups(source, wanted))
    check_target(source, target)
    return target


def rounded_from(
    source: Architecture, target: Architecture, sizes: Mapping[str, int | float | str | None]
) -> dict[str, float]:
    """What fractions of the source's sizes come to exactly, for those axes where the target has another size.

    Args:
        source: the model to prune.
        target: of `resolve_target`.
        sizes: what that was given.
    """
    exact = {
        axis: getattr(source, axis) * _fraction(axis, value, getattr(source, axis))
        for axis, value in sizes.items()
        if isinstance(value, float | str)
    }
    return {axis: round(float(size), 2) for axis, size in exact.items() if size != getattr(target, axis)}


def _heads_and_groups(source: Architecture, wanted: Mapping[str, int | float | str]) -> dict[str, int]:
    heads, groups = wanted.get("num_attention_heads"), wanted.get("num_query_groups")
    if heads is None and groups is None:
        return {}
    if groups is not None:
        num_groups = _size("num_query_groups", groups, source.num_query_groups, 1)
    elif source.heads_per_group == 1:  # Multi-head attention: a head is its own group.
        num_groups = _size("num_attention_heads", heads, source.num_attention_heads, 1)
    else:
        num_groups = source.num_query_groups
    if heads is None:
        return {"num_query_groups": num_groups, "num_attention_heads": num_groups * source.heads_per_group}
    num_heads = _size("num_attention_heads", heads, source.num_attention_heads, num_groups)
    return {"num_query_groups": num_groups, "num_attention_heads": num_heads}


def _multiple(axis: str, size: int, multiple_of: int | None) -> int:
    """The rounding step of a fraction of `size`."""
    if multiple_of is not None:
        if multiple_of > size:
            raise InputError(f"multiple_of={multiple_of}: larger than the source's {axis}, {size}")
        return multiple_of
    power_of_two = size & -size
    step = min(power_of_two, _LARGEST_MULTIPLE)
    while step > 1 and size < _FINEST_STEP * step:
        step //= 2
    return step


def _size(axis: str, value: int | float | str | None, of: int, multiple: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(
            f"{axis}={value!r}: must be a size (an integer) or a fraction of {of} such as 0.75 or 9/14"
        )
    if isinstance(value, int):
        if value < 1:
            raise InputError(
                f"{axis}={value}: must be a positive integer, or a fraction of {of} such as 0.75"
            )
        return value
    fraction = _fraction(axis, value, of)
    if fraction == 1:
        return of
    rounded = math.floor(of * fraction / multiple + Fraction(1, 2)) * multiple
    return min(max(rounded, multiple), of // multiple * multiple)


def _fraction(axis: str, value: float | str, of: int) -> Fraction:
    text = str(value).strip()
    # Fraction itself would also take "1e-999999", and compute it.
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})|(\d{0,9}\.\d{1,18}|\d{1,9}\.?)(?:e-?\d{1,2})?", text)
    try:
        fraction = Fraction(text) if match else Fraction(0)
    except ZeroDivisionError:
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise InputError(
            f"{axis}={value!r}: must be an integer or a fraction of {of} in (0, 1], such as 0.75 or 9/14"
        )
    return fraction
