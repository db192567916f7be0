"""Writes the generated part of docs/configuration.md: python scripts/configuration_page.py

Every key of conf/ with its legal values, its default and its explanation, from the schemas and the groups' files. What
stands above the marker is written by hand and stays.
"""

import dataclasses
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_minitron.config.ranges import Choice, Kind, Range, rules
from nemo_minitron.config.recipes import CommonConfig, OptimConfig
from nemo_minitron.run import help_text, overrides
from nemo_minitron.run.registry import RECIPES

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"
MARKER = "<!-- From here on generated: python scripts/configuration_page.py -->"
# The file of a group that its table shows, where several are; of the others what differs is listed.
SHOWN = {
    "data": "stdlib",
    "prune": "width",
    "distill": "demo",
    "cache": "hidden",
    "align": "sft",
    "merge": "ties",
    "cluster": "slurm",
}
_TYPES = {int: "integer", float: "number", bool: "true, false", str: "text"}


def schemas() -> dict[str, type[CommonConfig]]:
    """The schema of each recipe, by its name."""
    found = {}
    for recipe, place in RECIPES.items():
        module, _, name = place.partition(":")
        found[recipe] = getattr(importlib.import_module(f"nemo_minitron.config.{module}"), name)
    return found


def groups() -> dict[str, type[Any]]:
    """The schema of each group of conf/, in the order of `CommonConfig`."""
    found: dict[str, type[Any]] = {}
    for schema in schemas().values():
        for name, hint in typing.get_type_hints(schema).items():
            if (CONF / name).is_dir() and (cls := _dataclass(hint)) is not None:
                found[name] = cls
    return {
        field.name: found[field.name] for field in dataclasses.fields(CommonConfig) if field.name in found
    }


def parts() -> Iterator[tuple[str, type[Any], dict[str, dict[str, Any]]]]:
    """(heading, schema, values of each choice; the first is shown) of every table of the page."""
    yield "every recipe", CommonConfig, {"": _loaded(CONF / "common.yaml")}
    for name, cls in groups().items():
        files = {
            file.stem: _loaded(file) for file in sorted((CONF / name).glob("*.yaml")) if file.stem != "none"
        }
        shown = SHOWN.get(name, next(iter(files)))
        yield from _with_nested(name, cls, {shown: files[shown], **files})
    yield "optim", OptimConfig, {"": _loaded(CONF / "pretrain.yaml")["optim"]}
    for recipe, schema in schemas().items():
        yield from _with_nested(recipe, schema, {"": _loaded(CONF / f"{recipe}.yaml")})


def _with_nested(
    name: str, cls: type[Any], values: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, type[Any], dict[str, dict[str, Any]]]]:
    """A schema, and after it those of groups inside it that have no part of their own."""
    yield name, cls, values
    for key, hint in typing.get_type_hints(cls).items():
        inner = _dataclass(hint)
        if inner not in (None, OptimConfig) and not (CONF / key).is_dir():
            assert inner is not None
            prefix = "" if issubclass(cls, CommonConfig) else f"{name}."
            yield from _with_nested(
                prefix + key, inner, {choice: kept[key] for choice, kept in values.items()}
            )


def _dataclass(hint: Any) -> type[Any] | None:
    """The schema that a hint names, perhaps beside None."""
    options = [hint, *typing.get_args(hint)]
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _loaded(file: Path) -> dict[str, Any]:
    """A group's file with those that it begins with."""
    own = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(own, dict)
    before = [entry for entry in own.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    found: dict[str, Any] = {}
    for name in before:
        if name != "common":
            found = _merged(found, _loaded(file.with_name(f"{name}.yaml")))
    return _merged(found, {str(key): value for key, value in own.items()})


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As Hydra does, but a value that is still to be given stands above another."""
    both = {key: _merged(under[key], over[key]) for key in over if _are_dicts(under.get(key), over[key])}
    return {**under, **over, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def own_keys(cls: type[Any]) -> list[str]:
    """The keys that stand in a schema's table: of a recipe only what it adds that is no group of its own."""
    if not issubclass(cls, CommonConfig):
        return [field.name for field in dataclasses.fields(cls)]
    inputs = ("source", "student", "teacher", "teacher_cache", "sdg", "prepared", "optim")
    if cls is CommonConfig:
        return [f.name for f in dataclasses.fields(cls) if f.name not in groups() and f.name not in inputs]
    return [key for key in overrides.used_groups(cls) if key not in groups()]


def text_of(cls: type[Any]) -> str:
    """The explanation, a paragraph a line; an inherited docstring is not one."""
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _legal(hint: Any, *, null: bool) -> str:
    """What a field takes, in words."""
    either = typing.get_args(hint) if type(None) in typing.get_args(hint) else ()
    base = next((option for option in either if option is not type(None)), hint)
    if _dataclass(hint) is not None:
        return "a group"
    said = []
    for rule, _ in rules(base):
        if isinstance(rule, Choice):
            said.append(", ".join(rule.names))
        elif isinstance(rule, Kind):
            said.append("path" if rule.legal.startswith("a path whose") else rule.legal)
        elif isinstance(rule, Range):
            bounds = [
                ("at least", rule.least),
                ("above", rule.above),
                ("at most", rule.most),
                ("below", rule.below),
            ]
            said.append(", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None))
    plain = typing.get_args(base)[0] if typing.get_origin(base) is typing.Annotated else base
    shape = typing.get_origin(plain)
    kind = (
        {list: "list", dict: "values by name"}.get(shape, _TYPES.get(plain, "text")) if shape or plain else ""
    )
    if plain in (str, Any) and said:
        kind = ""
    return ", ".join(word for word in (kind, *said, "null" if either or null else "") if word)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return "to be given" if value == "???" else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not value or value is True
        else str(value)
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


def _table(cls: type[Any], values: dict[str, Any]) -> list[str]:
    keys, hints = own_keys(cls), typing.get_type_hints(cls, include_extras=True)
    nulls = {field.name for field in dataclasses.fields(cls) if field.default is None}
    lines = ["", "| key | takes | default |", "|---|---|---|"] if keys else []
    for key in keys:
        group = _dataclass(hints[key]) is not None and key != "cluster"
        takes = _legal(hints[key], null=key in nulls).replace("|", "\\|")
        lines.append(f"| `{key}` | {takes} | {'' if group else _shown(values.get(key))} |")
    return lines


def _others(name: str, choices: dict[str, dict[str, Any]]) -> list[str]:
    """How a group's other files differ from the one that the table shows."""
    (shown, values), *others = choices.items()
    if not others or not shown or "." in name:
        return []
    lines, first = ["", f"Defaults are those of `{name}={shown}`. Others:", ""], _flat(values)
    for choice, kept in others:
        differing = [f"`{key}={_plain(v)}`" for key, v in _flat(kept).items() if first.get(key, v) != v]
        lines.append(f"- `{name}={choice}`: {', '.join(differing).replace('???', 'FILE') or 'the same'}")
    return lines


def _section(name: str, cls: type[Any], choices: dict[str, dict[str, Any]]) -> list[str]:
    """One heading of the page, what its keys mean, their table, and how the group's other files differ."""
    if cls is CommonConfig:
        lines = ["", "### Every recipe", "", text_of(cls)]
    elif issubclass(cls, CommonConfig):
        does, text = help_text.does(name), re.sub(r"^`recipes/\w+\.py`\. ", "", text_of(cls))
        lines = ["", f"### `recipes/{name}.py`", "", does[0].upper() + does[1:], "", text]
        if used := [f"`{key}`" for key in overrides.used_groups(cls) if key in groups()]:
            lines += ["", f"Groups: {', '.join(used)}, and those of every recipe."]
    else:
        lines = ["", f"### `{name}`", "", text_of(cls)]
    return [*lines, *_table(cls, next(iter(choices.values()))), *_others(name, choices)]


def generated() -> str:
    """What stands below the marker."""
    lines = ["", "## Every key"]
    for name, cls, choices in parts():
        lines += _section(name, cls, choices)
    return "\n".join(lines) + "\n"


def unexplained() -> list[str]:
    """Keys of which the explanation beside them says nothing."""
    return [
        f"{name}: {key}"
        for name, cls, _ in parts()
        for key in own_keys(cls)
        if not re.search(rf"`(\w+\.)?{key}[`=]", text_of(cls))
        and _dataclass(typing.get_type_hints(cls)[key]) is None
    ]


def whole(current: str) -> str:
    """The page with its generated part anew."""
    return current.partition(MARKER)[0] + MARKER + "\n" + generated()


if __name__ == "__main__":
    PAGE.write_text(whole(PAGE.read_text()))
