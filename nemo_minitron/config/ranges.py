"""The legal values of settings, stated beside each field of a schema, and the one check that holds to them.

A field says `lr: Annotated[float, Range(above=0)] = 1e-4`; OmegaConf reads the type and passes over the rest. What
depends on two settings at once, or on the model, is checked where both are known.
"""

import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

from nemo_minitron.errors import InputError

# What indices of Megatron-core and NumPy hold in 32 bits; no setting counts further.
LARGEST_INTEGER = 2**31 - 1
_LONGEST_TEXT, _LONGEST_NAME = 4096, 255  # bytes: PATH_MAX and NAME_MAX of Linux
_SHOWN = 120


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, or `above` and `below`, which are left out."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def fault(self, value: Any) -> str | None:
        """What would be legal, if the number is not."""
        whole = isinstance(value, int)
        most = LARGEST_INTEGER if whole and self.most is None and self.below is None else self.most
        inside = (
            (whole or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (most is None or value <= most)
            and (self.below is None or value < self.below)
        )
        if inside:
            return None
        shown = most if whole and value > LARGEST_INTEGER else self.most
        bounds = [
            f"{word} {bound}"
            for word, bound in (
                ("at least", self.least),
                ("above", self.above),
                ("at most", shown),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(bounds) if whole else " ".join(["a finite number", " and ".join(bounds)]).strip()


class Choice:
    """One of some names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def fault(self, value: Any) -> str | None:
        """What would be legal, if the name is not."""
        return None if value in self.names else f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Kind:
    """Of a field that takes values of several types: what is legal, in words, and whether a value is."""

    legal: str
    holds: Callable[[Any], bool]

    def fault(self, value: Any) -> str | None:
        """What would be legal, if the value is not."""
        return None if self.holds(value) else self.legal


def _texts(value: Any) -> Iterator[str]:
    """Every text in a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and all(
        len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME for name in value.split("/")
    )


def _are_paths(value: Any) -> bool:
    several = isinstance(value, list) and bool(value)
    return all(map(_is_path, value)) if several else _is_path(value) and bool(value)


def _is_size(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float | str)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


def _is_layer_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_integer, [*value, *value.values()]))


def _is_text_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _are_counts(value: Any) -> bool:
    return _is_text_mapping(value) and all(_is_integer(count) and count > 0 for count in value.values())


_PATH = Kind(f"a path whose names have at most {_LONGEST_NAME} bytes each", _is_path)
_LAYERS = "a list of layer numbers, such as [3,4]"

Count = Annotated[int, Range(least=0)]
Positive = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # as numpy's
NotNegative = Annotated[float, Range(least=0)]
AboveZero = Annotated[float, Range(above=0)]
PathName = Annotated[str, _PATH]
Files = Annotated[Any, Kind("a path or glob, or a list of them", _are_paths)]
Beginning = Annotated[
    Any,
    Kind("auto (as the tokenizer does by itself), true or false", lambda v: v == "auto" or type(v) is bool),
]
Size = Annotated[
    Any, Kind("a size (an integer) or a fraction of the source's, such as 0.75 or 9/14", _is_size)
]
Layers = Annotated[Any, Kind(_LAYERS, _are_integers)]
LayersOrLate = Annotated[Any, Kind(f"{_LAYERS}, or late", lambda v: v == "late" or _are_integers(v))]
LayerMap = Annotated[
    Any,
    Kind("late, or teacher to student layers such as {29: 13}", lambda v: v == "late" or _is_layer_map(v)),
]
NamedValues = Annotated[Any, Kind("values by name, such as {parameters: 1/2}", _is_text_mapping)]
NamedCounts = Annotated[Any, Kind("positive integers by name, such as {ifeval_541: 100}", _are_counts)]
NamedChoices = Annotated[Any, Kind("lists by name, such as {hidden_size: [3/4,1/2]}", _is_text_mapping)]


def check_shape(schema: type, plain: dict[Any, Any], where: str = "") -> None:
    """Refuse a value where a schema has a group, a list or values by name, of which OmegaConf would not name the key.

    Args:
        schema: a dataclass.
        plain: what shall be merged into it.
        where: as for `check_ranges`.

    Raises:
        InputError: names the key, its value and what would be legal.
    """
    for name, hint in typing.get_type_hints(schema).items():
        value, key = plain.get(name), f"{where}{name}"
        # Python cannot make a float of it, and OmegaConf would not say where it stands.
        huge = isinstance(value, int) and value.bit_length() > 1023
        _expect(not huge, key, value, "a number of at most 308 digits")
        for kind in (hint, *typing.get_args(hint)):
            if value is None:
                continue
            if isinstance(kind, type) and is_dataclass(kind):
                _expect(isinstance(value, dict), key, value, "a group of settings")
                check_shape(kind, value, f"{key}.")
            elif list in (kind, typing.get_origin(kind)):
                _expect(isinstance(value, list), key, value, "a list")
                _check_groups(kind, {f"{key}[{number}]": item for number, item in enumerate(value)})
                _expect(_flat(kind, value), key, value, "a list of single values")
            elif dict in (kind, typing.get_origin(kind)):
                _expect(isinstance(value, dict), key, value, "values by name, such as {a: b}")
                _expect(_flat(kind, value.values()), key, value, "single values by name, such as {a: b}")
                _check_groups(kind, {f"{key}.{name}": item for name, item in value.items()})


def _check_groups(kind: Any, items: dict[str, Any]) -> None:
    """`check_shape` of each item by its key, where they are groups of settings."""
    for schema in filter(is_dataclass, typing.get_args(kind)):
        for key, item in items.items():
            _expect(isinstance(item, dict), key, item, "a group of settings")
            check_shape(schema, item, f"{key}.")  # type: ignore[arg-type]


def _flat(kind: Any, items: Iterable[Any]) -> bool:
    """Whether no item of a list or mapping of single values is one of several, which OmegaConf lets pass."""
    single = {str, int, float, bool} & {*typing.get_args(kind)[-1:]}
    return not (single and any(isinstance(item, list | dict) for item in items))


def _expect(holds: bool, key: str, value: Any, legal: str) -> None:
    if not holds:
        raise InputError(f"{key}={brief(value)}: must be {legal}")


def check_ranges(config: Any, where: str = "") -> None:
    """Hold a configuration, and those in it, to what its schemas say; null is legal wherever the schema has it.

    Args:
        config: a dataclass.
        where: what its keys begin with, such as "trainer.".

    Raises:
        InputError: names the key, its value and what would be legal.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        key, value = f"{where}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(value, list) and value and all(map(is_dataclass, value)):
            for number, item in enumerate(value):
                check_ranges(item, f"{key}[{number}].")
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for name, item in value.items():
                check_ranges(item, f"{key}.{name}.")
        elif value is not None:
            _check(key, value, hints[field.name])


def _check(key: str, value: Any, hint: Any) -> None:
    # What the layout and the launchers hand over is no user's.
    if key != "prepared":
        for text in _texts(value):
            _check_text(key, text)
    or_null = ", or null" if type(None) in typing.get_args(hint) else ""
    for rule, each in rules(hint):
        for item in value if each else [value]:
            if legal := rule.fault(item):
                raise InputError(f"{key}={brief(item)}: must be {legal}{or_null}")


def _check_text(key: str, text: str) -> None:
    # Surrogates are what Python makes of bytes that are no UTF-8; no result could be written of them.
    if re.search(r"[\x00\ud800-\udfff]", text) or len(text) > _LONGEST_TEXT:
        raise InputError(
            f"{key}={brief(text)}: must be UTF-8 without NUL, of at most {_LONGEST_TEXT} characters"
        )


def rules(hint: Any) -> list[tuple[Any, bool]]:
    """What a field's type says of its values, and whether it says so of each item of a list."""
    if typing.get_origin(hint) is Annotated:
        kind, *stated = typing.get_args(hint)
        return [(rule, False) for rule in stated if hasattr(rule, "fault")] + rules(kind)
    each = typing.get_origin(hint) is list
    return [(rule, each or inner) for part in typing.get_args(hint) for rule, inner in rules(part)]


def brief(value: Any) -> str:
    """A value for one line of a message: control characters are written out, and what is long is cut."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:  # more digits than Python may write
        return f"an integer of {value.bit_length()} bits"
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: repr(m[0])[1:-1], str(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
