"""The part of JSON Schema that function parameters use, decided without further packages.

Known keywords: type, properties, required, additionalProperties (true or false), enum, minimum, maximum, items,
description, title, default. Others are refused, so that no schema seems satisfied that was not looked at.

Source: json-schema.org, draft 2020-12, validation vocabulary.
"""

import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import InputError

_TYPES: dict[str, Any] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    # By the standard 1.0 is an integer.
    "integer": lambda v: (
        not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v % 1 == 0))
    ),
}
_KNOWN = {"type", "properties", "required", "additionalProperties", "enum", "minimum", "maximum", "items"}
_SILENT = {"description", "title", "default"}


def violation(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """What a value breaks of a schema, in words with its place; None where it satisfies it.

    Raises:
        InputError: a keyword or a type that is not known here.
    """
    if unknown := set(schema) - _KNOWN - _SILENT:
        raise InputError(f"schema at {path}: keyword {sorted(unknown)[0]!r} is not checked here")
    kind = schema.get("type")
    if kind is not None and kind not in _TYPES:
        raise InputError(f"schema at {path}: unknown type {kind!r}; known: {', '.join(_TYPES)}")
    if kind is not None and not _TYPES[kind](value):
        return f"{path}: is no {kind}"
    if "enum" in schema and json.dumps(value, sort_keys=True) not in (
        json.dumps(choice, sort_keys=True) for choice in schema["enum"]
    ):
        return f"{path}: is none of {schema['enum']}"
    if _TYPES["number"](value):
        if "minimum" in schema and value < schema["minimum"]:
            return f"{path}: is below {schema['minimum']}"
        if "maximum" in schema and value > schema["maximum"]:
            return f"{path}: is above {schema['maximum']}"
    if isinstance(value, dict):
        return _in_object(value, schema, path)
    if isinstance(value, list) and "items" in schema:
        found = (violation(item, schema["items"], f"{path}[{n}]") for n, item in enumerate(value))
        return next((problem for problem in found if problem), None)
    return None


def _in_object(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> str | None:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{path}: lacks {name}"
    for name, item in value.items():
        if name in properties:
            if problem := violation(item, properties[name], f"{path}.{name}"):
                return problem
        elif schema.get("additionalProperties") is False:
            return f"{path}: has {name}, which the schema does not know"
    return None
