"""Function calls: the system lists tools with their JSON schemas, the user asks for what one of them does."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.data.instruct.template_families import NAMES, WORDS, Draft, Skill, system, user

_CATEGORY = "function"
_SYSTEM = "Answer with one call of a tool, as JSON.\n"


@dataclass(frozen=True)
class _Tool:
    name: str
    properties: Mapping[str, Any]
    values: Callable[[random.Random], dict[str, Any]]
    wordings: Mapping[str, Sequence[str]]

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": dict(self.properties), "required": list(self.properties)}

    @property
    def listed(self) -> str:
        return json.dumps({"name": self.name, "parameters": self.schema})


_STRING: dict[str, Any] = {"type": "string"}
_INTEGER: dict[str, Any] = {"type": "integer"}
_MODES = ["on", "off", "auto"]

_TOOLS = [
    _Tool(
        "open_file",
        {"path": _STRING},
        lambda rng: {"path": rng.choice(WORDS)},
        {
            "train": [
                "Open the file {path}.",
                "Open {path}.",
                "I want to open {path}.",
                "Please open {path}.",
            ],
            "valid": ["Open the file at {path}."],
            "test": ["I want to open the file {path}."],
        },
    ),
    _Tool(
        "read_line",
        {"path": _STRING, "line": _INTEGER},
        lambda rng: {"path": rng.choice(WORDS), "line": rng.randint(1, 99)},
        {
            "train": [
                "Read line {line} of {path}.",
                "Get line {line} from the file {path}.",
                "What is in line {line} of {path}?",
                "Read the file {path}, line {line}.",
            ],
            "valid": ["Read line {line} from {path}."],
            "test": ["What is line {line} of the file {path}?"],
        },
    ),
    _Tool(
        "set_value",
        {"key": _STRING, "value": _INTEGER},
        lambda rng: {"key": rng.choice(WORDS), "value": rng.randint(0, 99)},
        {
            "train": [
                "Set {key} to {value}.",
                "The value of {key} must be {value}.",
                "Set the key {key} to the value {value}.",
                "Make {key} equal to {value}.",
            ],
            "valid": ["Set the value of {key} to {value}."],
            "test": ["The key {key} must be set to {value}."],
        },
    ),
    _Tool(
        "add",
        {"a": _INTEGER, "b": _INTEGER},
        lambda rng: {"a": rng.randint(1, 99), "b": rng.randint(1, 99)},
        {
            "train": ["Add {a} and {b}.", "What is {a} + {b}?", "Add {b} to {a}.", "{a} + {b} = ?"],
            "valid": ["What is {a} and {b}?"],
            "test": ["Please add {a} + {b}."],
        },
    ),
    _Tool(
        "set_mode",
        {"mode": {"type": "string", "enum": _MODES}},
        lambda rng: {"mode": rng.choice(_MODES)},
        {
            "train": ["Set the mode to {mode}.", "Mode {mode}.", "I want it {mode}.", "Use the mode {mode}."],
            "valid": ["Set it to {mode}."],
            "test": ["I want the mode {mode}."],
        },
    ),
    _Tool(
        "send",
        {"to": _STRING, "text": _STRING},
        lambda rng: {"to": rng.choice(NAMES), "text": rng.choice(WORDS)},
        {
            "train": [
                "Send {text} to {to}.",
                "Send {to} the text {text}.",
                "Tell {to}: {text}",
                "{to} should get the text {text}.",
            ],
            "valid": ["Send the text {text} to {to}."],
            "test": ["Please send {to} the text {text}."],
        },
    ),
    _Tool(
        "wait",
        {"seconds": {"type": "integer", "minimum": 1, "maximum": 60}},
        lambda rng: {"seconds": rng.randint(1, 60)},
        {
            "train": [
                "Wait {seconds} seconds.",
                "Do nothing for {seconds} seconds.",
                "Stop for {seconds} seconds.",
            ],
            "valid": ["Wait for {seconds} seconds."],
            "test": ["Please wait {seconds} seconds."],
        },
    ),
]


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def _drafter(tool: _Tool) -> Callable[[random.Random, str], Draft]:
    def draft(rng: random.Random, wording: str) -> Draft:
        values = tool.values(rng)
        other = rng.choice([t for t in _TOOLS if t is not tool])
        listed = [tool.listed, other.listed] if rng.random() < 0.5 else [tool.listed]
        rng.shuffle(listed)
        answer = _call(tool.name, values)
        return Draft(
            [system(_SYSTEM + "\n".join(listed)), user(wording.format(**values))],
            answer,
            [
                {"kind": "call_json"},
                {"kind": "call_name", "name": tool.name},
                {"kind": "call_schema", "schema": tool.schema},
                {"kind": "call_arguments", "arguments": values},
            ],
            _wrong(rng, tool, other, values, answer),
            [{"kind": "gives_call", "name": tool.name, "arguments": values}],
        )

    return draft


def _wrong(rng: random.Random, tool: _Tool, other: _Tool, values: dict[str, Any], answer: str) -> list[str]:
    key = rng.choice(list(values))
    lacking = {k: v for k, v in values.items() if k != key}
    mistyped = {**values, key: [values[key]]}
    changed = next(v for v in iter(lambda: tool.values(rng), None) if v != values)
    return [
        _call(other.name, values),
        _call(tool.name, lacking),
        _call(tool.name, mistyped),
        _call(tool.name, changed),
        answer[:-1],
        f"{tool.name}({', '.join(map(str, values.values()))})",
    ]


SKILLS = [Skill(_CATEGORY, tool.name, tool.wordings, _drafter(tool)) for tool in _TOOLS]
