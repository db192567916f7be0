"""The plan of a pruning: which units of the source stay. A JSON file that any parallel layout can carry
out."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES, Axis
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, write_text
from nemo_minitron.pruning.target import check_target

VERSION = 1
_KEYS = ("version", "source_sha256", "source", "target", "scores", "kept", "head_residual")


@dataclass(frozen=True)
class Kept:
    """Kept indices, 0-based and global in the source model, ascending; None is an axis left alone.

    The per-layer axes hold one list for each *kept* layer, in order. Heads are query heads; where groups are
    pruned, `num_attention_heads` lists the heads kept inside the kept groups.
    """

    layers: list[int] | None = None
    hidden_size: list[int] | None = None
    ffn_hidden_size: list[list[int]] | None = None
    num_attention_heads: list[list[int]] | None = None
    num_query_groups: list[list[int]] | None = None

    def of(self, axis: Axis) -> Any:
        """The kept units of a width axis: a list, a list for each kept layer, or None."""
        return getattr(self, axis.name)


@dataclass(frozen=True)
class PrunePlan:
    """What to keep of a model of architecture `source` so that it becomes `target`.

    Attributes:
        source_sha256: digest of the source checkpoint, as the scores give it.
        scores: how the kept units were chosen (importance, aggregation, samples, seed, ...): plain values.
        head_residual: None, or for each kept layer the pairs (kept head, pruned head) of the head residual
            (arXiv 2407.14679 §2.2): the kept head's query weights q become q + (q - those of the pruned one).

    Raises:
        InputError: kept indices that do not fit source and target.
    """

    source_sha256: str
    source: Architecture
    target: Architecture
    scores: dict[str, Any] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    head_residual: list[list[list[int]]] | None = None

    def __post_init__(self) -> None:
        _check_plan(self)

    @property
    def source_layers(self) -> list[int]:
        """The source index of each of the target's layers."""
        return list(range(self.source.num_layers)) if self.kept.layers is None else self.kept.layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: a whole file or none."""
        place = Path(path)
        text = json.dumps({name: self.to_dict()[name] for name in _KEYS}, allow_nan=False)
        write_text(place, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrunePlan":
        """Read and check a plan.

        Raises:
            InputError: no such file, not JSON, or anything that is no plan; names the file and the key.
        """
        try:
            return _from_dict(_read_json(Path(path)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON that a plan can be read from ({error})") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _from_dict(values: Any) -> PrunePlan:
    _check_keys("the plan", values, _KEYS)
    if values["version"] != VERSION or isinstance(values["version"], bool):
        raise InputError(f"version: {values['version']!r}, this release reads {VERSION}")
    kept_names = [f.name for f in dataclasses.fields(Kept)]
    _check_keys("kept", values["kept"], kept_names)
    if not isinstance(values["scores"], dict):
        raise InputError("scores: must be an object")
    return PrunePlan(
        source_sha256=values["source_sha256"],
        source=_architecture("source", values["source"]),
        target=_architecture("target", values["target"]),
        scores=values["scores"],
        kept=Kept(**values["kept"]),
        head_residual=values["head_residual"],
    )


def _check_keys(where: str, values: Any, names: Sequence[str]) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where}: must be an object")
    for name in names:
        if name not in values:
            raise InputError(f"{where}: key {name!r} is missing")
    if unknown := sorted(set(values) - set(names)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}")


def _architecture(key: str, values: Any) -> Architecture:
    if not isinstance(values, dict):
        raise InputError(f"{key}: must be an object")
    try:
        architecture = Architecture.from_dict(values)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    # Dataclasses do not check types: "false" would pass for a true flag.
    for name, annotated in get_type_hints(Architecture).items():
        value, kind = getattr(architecture, name), annotated
        if float in (annotated, *get_args(annotated)):
            kind = annotated | int  # JSON writes 1.0 as 1
        if not isinstance(value, kind) or (isinstance(value, bool) and annotated is not bool):
            raise InputError(f"{key}.{name}: {value!r} is of the wrong type")
    return architecture


def _check_plan(plan: PrunePlan) -> None:
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


def _check_heads(plan: PrunePlan, layer: int, heads: list[int]) -> None:
    groups = plan.kept.num_query_groups
    kept = list(range(plan.source.num_query_groups)) if groups is None else groups[layer]
    expected = [group for group in kept for _ in range(plan.target.heads_per_group)]
    if [head // plan.source.heads_per_group for head in heads] != expected:
        raise InputError(
            f"kept.num_attention_heads[{layer}]: every kept query group must keep "
            f"{plan.target.heads_per_group} heads"
        )


def _check_residual(plan: PrunePlan) -> None:
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
