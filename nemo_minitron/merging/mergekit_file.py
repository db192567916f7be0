"""mergekit's YAML, as far as its common form goes (mergekit 0.1.4, "Merge Configuration"); the rest is refused by name.

Read are `models`, or `slices` with one slice of all layers; `merge_method`, `base_model`, `parameters` of the whole and
of each model with numbers, lists by layer and filters; `dtype`, `out_dtype`, `tokenizer_source`, `chat_template: auto`.
Precision differs: mergekit computes in `dtype`, here it is float32 and the result is rounded once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from nemo_minitron import files
from nemo_minitron.checkpoints.source import check_expanded
from nemo_minitron.config.ranges import brief
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.settings import GRADIENT, STEPS, Merge, Setting

_LARGEST = 1 << 20
_DTYPES = ("float32", "bfloat16", "float16")
_TOP = (
    *("models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "chat_template"),
)
_BY_MODEL = ("weight", "density")
# The last two are not mergekit's: they stand in what this project writes.
_WHOLE = ("normalize", "rescale", "lambda", "int8_mask", "filter_wise", "t", "seed", "spread")


class _File:
    """One file, and how messages call it."""

    def __init__(self, path: str) -> None:
        self.where = f"merge.file={path}"

    def refuse(self, key: str, value: Any, legal: str) -> InputError:
        return InputError(f"{self.where}: {key}: {brief(value)}: {legal}")

    def known(self, key: str, given: Any, names: tuple[str, ...]) -> dict[str, Any]:
        """A mapping with no other keys."""
        if not isinstance(given, dict):
            raise self.refuse(key, given, "must be values by name")
        for name in given:
            if name not in names:
                inside = f"{key}." if key else ""
                raise InputError(
                    f"{self.where}: {inside}{brief(name)}: is not supported; those are {', '.join(names)}"
                )
        return given

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self.refuse(key, value, "must be a path")
        return value


def read(path: str, seed: int) -> Merge:
    """A merge out of a file.

    Args:
        path: of it; models in it are paths from the current directory, as for mergekit.
        seed: of DARE's masks, which mergekit takes from its command line.

    Raises:
        InputError: no such file, no YAML, or something that is not supported.
    """
    file = _File(path)
    try:
        given = yaml.safe_load(files.read_text(files.user_path(path), _LARGEST))
        check_expanded(given)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise InputError(f"{file.where}: cannot be read ({brief(reason)})") from None
    top = file.known("", given, _TOP)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        raise file.refuse("merge_method", method, f"must be one of {', '.join(METHODS)}")
    entries, of_slice, layers = _entries(file, top)
    whole = {**_parameters(file, "parameters", top.get("parameters"))}
    levels = [of_slice, whole]
    base = None if top.get("base_model") is None else file.text("base_model", top["base_model"])
    entries, kept = _with_base(file, method, entries, base)
    return Merge(
        method=method,
        models=tuple(model for model, _ in entries),
        base=kept,
        weights=tuple(_setting(file, method, "weight", [own, *levels], None) for _, own in entries),
        densities=tuple(_setting(file, method, "density", [own, *levels], 1.0) for _, own in entries),
        t=_setting(file, method, "t", levels, None),
        normalize=_single(file, levels, "normalize", bool, None),
        rescale=_rescale(file, levels),
        scale=float(_single(file, levels, "lambda", (int, float), 1.0)),
        filter_wise=bool(_single(file, levels, "filter_wise", bool, False)),
        dtype=_dtype(file, top),
        tokenizer=_tokenizer(file, top, base),
        seed=int(_single(file, levels, "seed", int, seed)),
        layers=layers,
    )


def _entries(
    file: _File, top: dict[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any], int | None]:
    """(model, its parameters) of each, the parameters of the slice, and how many layers the models are to have."""
    if (top.get("models") is None) == (top.get("slices") is None):
        raise InputError(f"{file.where}: must have either models or slices")
    own: tuple[str, ...] = ("model", "parameters")
    key, given = "models", top.get("models")
    of_slice: dict[str, Any] = {}
    if given is None:
        slices = top["slices"]
        if not isinstance(slices, list) or len(slices) != 1:
            raise file.refuse(
                "slices",
                slices,
                "one slice of all layers is read",
            )
        only = file.known("slices[0]", slices[0], ("sources", "parameters"))
        of_slice = _parameters(file, "slices[0].parameters", only.get("parameters"))
        key, given, own = "slices[0].sources", only.get("sources"), (*own, "layer_range")
    if not isinstance(given, list) or not given:
        raise file.refuse(key, given, "must be a list of models")
    found, layers = [], None
    for number, entry in enumerate(given):
        at = f"{key}[{number}]"
        entry = file.known(at, entry, own)
        layers = _layers(file, at, entry, layers)
        parameters = _parameters(file, f"{at}.parameters", entry.get("parameters"), _BY_MODEL)
        found.append((file.text(f"{at}.model", entry.get("model")), parameters))
    return found, of_slice, layers


def _layers(file: _File, at: str, entry: Mapping[str, Any], before: int | None) -> int | None:
    """The layers of the models, as a `layer_range` of all of them says it."""
    given = entry.get("layer_range")
    if given is None:
        return before
    whole = isinstance(given, list) and len(given) == 2 and given[0] == 0 and type(given[1]) is int
    if not whole or before not in (None, given[1]):
        legal = "must be [0, layers of the models], the same for all"
        raise file.refuse(f"{at}.layer_range", given, legal)
    return int(given[1])


def _parameters(
    file: _File, key: str, given: Any, names: tuple[str, ...] = (*_BY_MODEL, *_WHOLE)
) -> dict[str, Any]:
    return {} if given is None else file.known(key, given, names)


def _with_base(
    file: _File, method: str, entries: list[tuple[str, dict[str, Any]]], base: str | None
) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """The entries as the method takes them, and the base that it starts from."""
    if METHODS[method].base:
        return [entry for entry in entries if entry[0] != base], base
    if base is not None and base not in [model for model, _ in entries]:
        raise file.refuse("base_model", base, f"merge_method={method} needs it among its models")
    if method == "slerp":
        if base is None:
            raise InputError(f"{file.where}: base_model: slerp goes from it; name one of the two models")
        entries = sorted(entries, key=lambda entry: entry[0] != base)
    return entries, None


def _setting(
    file: _File, method: str, name: str, levels: Sequence[Mapping[str, Any]], otherwise: float | None
) -> Setting:
    """A number by tensor: a model's own before a slice's before the whole's."""
    rules = [rule for level in levels if name in level for rule in _rules(file, name, level[name])]
    if not rules and otherwise is None and name in METHODS[method].uses:
        raise InputError(f"{file.where}: parameters.{name}: is missing; merge_method={method} needs it")
    spread = _single(file, levels, "spread", str, GRADIENT)
    if spread not in (GRADIENT, STEPS):
        raise file.refuse("parameters.spread", spread, f"must be {GRADIENT} or {STEPS}")
    return Setting((*rules, *([] if otherwise is None else [(None, (otherwise,))])), spread)


def _rules(file: _File, name: str, value: Any) -> Iterator[tuple[str | None, tuple[float, ...]]]:
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
        for rule in value if isinstance(value, list) else [value]:
            rule = file.known(name, rule, ("filter", "value"))
            part = rule.get("filter")
            if part is not None and not isinstance(part, str):
                raise file.refuse(f"{name}.filter", part, "must be a part of a tensor's name")
            yield part, _numbers(file, name, rule.get("value"))
    else:
        yield None, _numbers(file, name, value)


def _numbers(file: _File, name: str, value: Any) -> tuple[float, ...]:
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in several):
        raise file.refuse(f"parameters.{name}", value, "must be a number, or a list of numbers by layer")
    return tuple(float(v) for v in several)


def _single(file: _File, levels: Sequence[Mapping[str, Any]], name: str, kind: Any, otherwise: Any) -> Any:
    for level in levels:
        if name in level:
            value = level[name]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                legal = {bool: "must be true or false", str: "must be text"}.get(kind, "must be a number")
                raise file.refuse(f"parameters.{name}", value, legal)
            return value
    return otherwise


def _rescale(file: _File, levels: Sequence[Mapping[str, Any]]) -> str | None:
    """mergekit's is true or false, and keeps the sum of magnitudes."""
    _single(file, levels, "int8_mask", bool, None)  # of mergekit's memory; the result is the same
    for level in levels:
        if isinstance(level.get("rescale"), str) and level["rescale"] in ("none", "density", "l1"):
            return str(level["rescale"])
    asked = _single(file, levels, "rescale", bool, None)
    if asked is None:
        return None
    return "l1" if asked else "none"


def _dtype(file: _File, top: Mapping[str, Any]) -> str:
    found = "source"
    for key in ("dtype", "out_dtype"):
        value = top.get(key)
        if value is not None and value not in _DTYPES:
            raise file.refuse(key, value, f"must be one of {', '.join(_DTYPES)}")
        found = value or found
    return found


def _tokenizer(file: _File, top: Mapping[str, Any], base: str | None) -> str | None:
    if top.get("chat_template") not in (None, "auto"):
        raise file.refuse(
            "chat_template", top["chat_template"], "is not supported; the tokenizer's own is kept"
        )
    source = top.get("tokenizer_source")
    if source == "union":
        raise file.refuse("tokenizer_source", source, "is not supported; models must have one tokenizer")
    return base if source in (None, "base") else file.text("tokenizer_source", source)
