"""Overrides as a user types them, made into Hydra's grammar: what the shell hands over is what the recipe gets.

Hydra's lexer refuses `~/models`, `modèle`, `a=b`, `#` and more in a plain value. Here a value of a key that holds text
is always taken as typed; of another key, where Hydra cannot read it. What is Hydra's own syntax stays: null,
quoted text, [lists], {mappings}, ${interpolations}, and in a sweep (-m) commas and functions.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.recipes import CommonConfig
from nemo_minitron.errors import InputError
from nemo_minitron.run.terminal import short

SWEEP = ("-m", "--multirun")
_KEY = re.compile(r"(?:\+{0,2})([A-Za-z_][\w./@:-]*)")
# Options of Hydra whose value is the next argument, which may hold anything.
_TAKES_VALUE = (
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--package",
    "-p",
)
# What every recipe has a use for; the rest of CommonConfig only those that declare it themselves.
_SHARED = ("run_dir", "overwrite", "seed", "data", "trainer", "eval", "prepared", "cluster")

# Mappings that take keys which their files do not list.
_OPEN = "pipeline.steps."
# Of the trainer's settings those that other recipes take from their own groups.
_PRETRAINING = ("trainer.max_steps", "trainer.val_check_interval", "trainer.limit_val_batches")


def for_hydra(name: str, schema: type[CommonConfig], typed: Sequence[str], *, compose: bool) -> list[str]:
    """The command line that Hydra gets.

    Args:
        name: of the recipe.
        typed: the arguments after the program's name.
        compose: for a launcher, which has run directories of its own.

    Raises:
        InputError: `hydra.run.dir`, or a key that the recipe has no use for.
    """
    made, sweep = [], any(argument in SWEEP for argument in typed)
    texts = text_keys(schema)
    resolved = any(argument in ("--config-name", "-cn") for argument in typed)
    for before, argument in zip(["", *typed], typed, strict=False):
        if before in _TAKES_VALUE or (key := key_of(argument)) is None:
            made.append(argument)
            continue
        if key == "hydra.run.dir" and not resolved:
            value = short(argument.partition("=")[2])
            raise InputError(f"hydra.run.dir={value}: a run's directory is its run_dir; say run_dir={value}")
        _check_used(name, schema, key, argument)
        quoted = for_parser(argument, text=key in texts, sweep=sweep)
        if key.startswith(_OPEN) and not quoted.startswith(("+", "~")):
            quoted = f"++{quoted}"
        made.append(_sweep_directory(quoted) if sweep and key == "run_dir" and not compose else quoted)
    # Hydra takes -m only in front of the overrides.
    return [*(text for text in made if text in SWEEP), *(text for text in made if text not in SWEEP)]


def key_of(argument: str) -> str | None:
    """The key of an override, None for an option."""
    name, equals, _ = argument.removeprefix("~").partition("=")
    found = _KEY.fullmatch(name)
    return found[1] if found and (equals or argument.startswith("~")) else None


def given(typed: Sequence[str], key: str) -> bool:
    """Whether the user gave a key a value."""
    return any(key_of(argument) == key for argument in typed)


def for_parser(override: str, *, text: bool, sweep: bool) -> str:
    """One override in Hydra's grammar.

    Args:
        override: as typed, `key=value`.
        text: whether the key holds text: its value is then never a number or a truth value.
        sweep: whether commas separate values.
    """
    key, equals, value = override.partition("=")
    if not equals or not value or _is_syntax(value):
        return override
    if sweep and _is_sweep(override):
        return override
    if not text:
        if _parses(override) or value[0] == "{":
            return override
        if value[0] == "[":
            return f"{key}=[{_separately(value[1:-1])}]" if value[-1] == "]" else override
    if sweep and "," in value:
        return f"{key}={_separately(value)}"
    return f"{key}={_quoted(value)}"


def _is_syntax(value: str) -> bool:
    """Whether a value can only be meant as Hydra's or OmegaConf's."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value in ("null", "???") or "${" in value or quoted


def _separately(values: str) -> str:
    return (
        ",".join(item if _is_syntax(item) else _quoted(item) for item in values.split(",")) if values else ""
    )


def _quoted(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _parses(override: str) -> bool:
    return _parsed(override) is not None


def _is_sweep(override: str) -> bool:
    found = _parsed(override)
    return found is not None and found.is_sweep_override()


def _sweep_directory(override: str) -> str:
    """`run_dir=DIR -m`: each configuration has DIR/0, DIR/1 and so on; a sweep over run_dir names them itself."""
    if _is_sweep(override):
        return override
    return "hydra.sweep.dir=" + override.partition("=")[2]


def text_keys(schema: type[Any], prefix: str = "") -> set[str]:
    """The keys of a schema, and of the groups in it, that hold text."""
    found = set()
    for name, hint in typing.get_type_hints(schema).items():
        either = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if either else (hint,)
        if str in options:
            found.add(prefix + name)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                found |= text_keys(option, f"{prefix}{name}.")
    return found


def used_groups(schema: type[CommonConfig]) -> list[str]:
    """What a recipe declares beside what every recipe has: its inputs and its groups."""
    classes = schema.__mro__[: schema.__mro__.index(CommonConfig)]
    return list(dict.fromkeys(name for cls in reversed(classes) for name in cls.__annotations__))


def _check_used(name: str, schema: type[CommonConfig], key: str, override: str) -> None:
    top = re.split("[./@]", key)[0]
    common = {field.name for field in dataclasses.fields(CommonConfig)}
    used = used_groups(schema)
    if top in common and top not in _SHARED and top not in used:
        raise InputError(f"{short(override)}: {name} has no use for {top}; it takes {', '.join(used)}")
    if key in _PRETRAINING and "optim" not in used:
        own = [
            f"; it takes {group}{key.removeprefix('trainer')}"
            for group in ("distill", "align")
            if group in used
        ]
        raise InputError(f"{short(override)}: {name} has no use for {key}{''.join(own)}")


def with_home(config: DictConfig) -> DictConfig:
    """A configuration, resolved, in which `~/x` and `~user/x` are paths: a shell does not expand them after `=`."""
    return OmegaConf.create(_with_home(OmegaConf.to_container(config, resolve=True)))


def _with_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
