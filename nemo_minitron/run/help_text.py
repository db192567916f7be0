"""What `--help` says: the recipe, its presets, what its keys mean; the texts are those of the schemas and of conf/."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from nemo_minitron.run import overrides
from nemo_minitron.run.registry import RECIPES, resources

_WIDTH = 110
_FOOTER = """\
Everything that is shown below can be overridden (a.b=value). -m runs each of comma-separated values, --cfg job only
shows the configuration, --hydra-help has Hydra's own options.

Groups (group=choice):
$APP_CONFIG_GROUPS
The configuration as composed:

$CONFIG"""


def overview() -> str:
    """The recipes, one a line."""
    width = max(map(len, RECIPES))
    lines = [f"  {name:{width}}  {does(name)}" for name in RECIPES]
    head = "python -m nemo_minitron RECIPE [key=value ...]; --help after a recipe's name explains it"
    return "\n".join([head, "", *lines])


def help_text(name: str, schema: type[Any]) -> str:
    """A template for Hydra's help, which fills in the groups and the composed configuration."""
    own = "\n\n".join([f"{name}: {does(name)}", *_presets(name), *_explained(name, schema)])
    return own.replace("$", "$$") + "\n\n" + _FOOTER


def does(name: str) -> str:
    """The first sentence of the module that does the work, without the recipe's name."""
    if name not in RECIPES:
        return ""
    spec = importlib.util.find_spec(f"nemo_minitron.workflows.{name}.run")
    assert spec is not None
    assert spec.origin is not None
    first = (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").partition("\n")[0]
    return first.partition(": ")[2] or first


def _presets(name: str) -> list[str]:
    """The commands in the headers of the presets that are for this recipe."""
    folder = resources() / "conf" / "conf"
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        comments = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
        text = " ".join(comments).removeprefix("@package _global_ ")
        if re.match(rf"python recipes/{name}\.py\b", text):
            found.append(_wrapped(text, "  "))
    return ["Presets:\n" + "\n".join(found)] if found else []


def _explained(name: str, schema: type[Any]) -> list[str]:
    """The docstrings of the schema and of the groups that the recipe uses."""
    hints = typing.get_type_hints(schema)
    groups = [*overrides.used_groups(schema), "data", "trainer", "eval"]
    parts = [(schema, name)]
    parts += [(hints[key], key) for key in dict.fromkeys(groups) if dataclasses.is_dataclass(hints[key])]
    explained = []
    for cls, key in parts:
        head = "Its keys:" if cls is schema else f"{key}:"
        explained.append(f"{head}\n{_wrapped(inspect.cleandoc(cls.__doc__ or ''), '  ')}")
        for field, hint in typing.get_type_hints(cls).items():
            if cls is not schema and dataclasses.is_dataclass(hint):
                explained.append(f"{key}.{field}:\n{_wrapped(inspect.cleandoc(hint.__doc__ or ''), '  ')}")
    return explained


def _wrapped(text: str, indent: str) -> str:
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n".join(
        textwrap.fill(part, _WIDTH, initial_indent=indent, subsequent_indent=indent) for part in paragraphs
    )
