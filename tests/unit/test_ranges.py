"""Ranges of settings: every number of every schema has one, and what is outside is refused with one line."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from nemo_minitron.alignment.comparisons import LOSSES
from nemo_minitron.config import ranges
from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.ranges import Choice, Count, Files, Positive, Range, check_ranges, check_shape
from nemo_minitron.config.recipes import CommonConfig, SearchRecipe
from nemo_minitron.data.chat.fitting import OVERLONG
from nemo_minitron.data.chat.formats import FORMATS
from nemo_minitron.distillation.cache.format import FORMS
from nemo_minitron.distillation.intermediate import DISTANCES, PLACES, PROJECTIONS
from nemo_minitron.distillation.loss.settings import DIVERGENCES
from nemo_minitron.errors import InputError
from nemo_minitron.importance.aggregation import STATISTICS
from tests.unit.test_config import SCHEMAS

# Groups that a recipe has no use for stay as they were composed.
UNUSED = {f.name for f in dataclasses.fields(CommonConfig)}


def schemas(schema: type) -> Iterator[type]:
    """A schema and those in it."""
    yield schema
    for hint in typing.get_type_hints(schema).values():
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                yield from schemas(kind)


EVERY = {found for recipe in SCHEMAS.values() for found in schemas(recipe)}


def kinds(hint: Any) -> set[Any]:
    """The plain types in a hint."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return kinds(parts[0])
    return {kind for part in parts for kind in kinds(part)} if parts else {hint}


def stated(schema: type, name: str) -> list[Any]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return [rule for rule, _ in ranges.rules(hints[name])]


def test_every_number_and_every_free_field_says_what_is_legal() -> None:
    assert ClusterConfig in EVERY
    assert len(EVERY) > 20
    numbers = 0
    for schema in EVERY:
        for name, hint in typing.get_type_hints(schema).items():
            rules = stated(schema, name)
            if kinds(hint) & {int, float}:
                assert any(isinstance(rule, Range) for rule in rules), f"{schema.__name__}.{name}"
                numbers += 1
            elif Any in kinds(hint) and name not in UNUSED:
                assert rules, f"{schema.__name__}.{name}"
    assert numbers > 100


def test_defaults_are_legal() -> None:
    for schema in EVERY:
        for f in dataclasses.fields(schema):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if default not in (None, dataclasses.MISSING, "???") and not dataclasses.is_dataclass(default):
                for item in default if isinstance(default, list) else [default]:
                    assert not [rule.fault(item) for rule in stated(schema, f.name) if rule.fault(item)]


@pytest.mark.parametrize(
    ("group", "name", "library"),
    [
        ("prune", "batch_aggregation", STATISTICS),
        ("prune", "sequence_aggregation", STATISTICS),
        ("distill", "loss", (*DIVERGENCES, "cross_entropy")),
        ("distill.intermediate", "at", PLACES),
        ("distill.intermediate", "distance", DISTANCES),
        ("distill.intermediate", "projection", PROJECTIONS),
        ("cache", "form", FORMS),
        ("align", "overlong", OVERLONG),
        ("align.dpo", "preference_loss", LOSSES),
        ("instruct_data", "format", ("auto", *FORMATS)),
        ("instruct_data", "overlong", OVERLONG),
    ],
)
def test_choices_are_those_of_the_code(group: str, name: str, library: tuple[str, ...]) -> None:
    for schema in SCHEMAS.values():
        found: Any = schema
        for part in group.split("."):
            found = typing.get_type_hints(found).get(part) if dataclasses.is_dataclass(found) else None
        if dataclasses.is_dataclass(found):
            (choice,) = [rule for rule in stated(found, name) if isinstance(rule, Choice)]
            assert sorted(choice.names) == sorted(library)
            return
    raise AssertionError(f"no schema has {group}")


@dataclass
class Inner:
    names: list[Annotated[str, Choice("a", "b")]] = field(default_factory=list)
    count: Count = 0


@dataclass
class Outer:
    share: Annotated[float, Range(above=0, most=1)] = 0.5
    rate: Annotated[float, Range(least=0, below=1)] = 0.5
    size: Annotated[float, Range(above=0)] = 0.5
    any: Annotated[float, Range()] = 0.5
    steps: Positive | None = None
    small: Annotated[int, Range(least=2, most=5)] = 2
    files: Files = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"share": 0.0}, "share=0.0: must be a finite number above 0 and at most 1"),
        ({"share": 1.5}, "share=1.5: must be a finite number above 0 and at most 1"),
        ({"rate": 1.0}, "rate=1.0: must be a finite number at least 0 and below 1"),
        ({"rate": -0.1}, "rate=-0.1: must be a finite number at least 0 and below 1"),
        ({"size": math.nan}, "size=nan: must be a finite number above 0"),
        ({"size": math.inf}, "size=inf: must be a finite number above 0"),
        ({"any": -math.inf}, "any=-inf: must be a finite number"),
        ({"steps": 0}, "steps=0: must be at least 1, or null"),
        ({"steps": 10**24}, f"steps={10**24}: must be at least 1 and at most 2147483647, or null"),
        (
            {"steps": 10**9999},
            "steps=an integer of 33216 bits: must be at least 1 and at most 2147483647, or null",
        ),
        ({"small": 6}, "small=6: must be at least 2 and at most 5"),
        ({"files": 5}, "files=5: must be a path or glob, or a list of them"),
        ({"files": ["a", 5]}, "files=['a', 5]: must be a path or glob, or a list of them"),
        (
            {"files": "x" * 300},
            f"files={'x' * 120}... (300 characters): must be a path or glob, or a list of them",
        ),
        (
            {"files": "/x" * 2500},
            f"files={'/x' * 60}... (5000 characters): must be UTF-8 without NUL, of at most 4096",
        ),
        ({"files": "a\0b"}, "files=a\\x00b: must be UTF-8 without NUL"),
        ({"files": "a\udcff"}, "files=a\\udcff: must be UTF-8"),
        ({"inner": {"count": -1}}, "inner.count=-1: must be at least 0"),
        ({"inner": {"names": ["a", "c\n"]}}, "inner.names=c\\n: must be one of a, b"),
    ],
)
def test_what_is_outside_is_named(values: dict[str, Any], line: str) -> None:
    given = Outer(**{**values, **({"inner": Inner(**values["inner"])} if "inner" in values else {})})
    with pytest.raises(InputError) as caught:
        check_ranges(given)
    assert str(caught.value).startswith(line)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("schema", "key", "value", "line"),
    [
        (ClusterConfig, "srun_options", [[1]], "srun_options=[[1]]: must be a list of single values"),
        (ClusterConfig, "setup", ["a", {"b": 1}], "setup=['a', {'b': 1}]: must be a list of single values"),
        (ClusterConfig, "env", {"A": ["b"]}, "env={'A': ['b']}: must be single values by name"),
        (Outer, "inner", {"names": [["a"]]}, "inner.names=[['a']]: must be a list of single values"),
    ],
)
def test_single_values_are_single(schema: type, key: str, value: Any, line: str) -> None:
    """OmegaConf would take them, and what reads them would fail."""
    with pytest.raises(InputError) as caught:
        check_shape(schema, {key: value})
    assert str(caught.value).startswith(line)


def test_what_is_inside_passes() -> None:
    check_ranges(Outer(1.0, 0.0, 1e300, -1e300, 2**31 - 1, 5, ["a/*.txt"], Inner(["b"], 3)))
    check_ranges(Outer())


def test_omegaconf_reads_the_types_alone() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(Outer), {"steps": 3, "share": 1, "inner": {"names": ["a"]}})
    assert OmegaConf.to_object(merged) == Outer(share=1.0, steps=3, inner=Inner(["a"]))
    assert SearchRecipe in EVERY
