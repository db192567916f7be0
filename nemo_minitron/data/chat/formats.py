"""The formats that instruct data comes in, and their conversion to `messages`.

messages         {"messages": [{"role", "content"}], "tools"?}: OpenAI's; `tool_calls` and `tools` become JSON text
alpaca           {"instruction", "input"?, "output", "system"?, "history"?}
self_instruct    {"instruction", "instances": [{"input", "output"}]}: one conversation for each instance
sharegpt         {"conversations": [{"from": "human"|"gpt"|..., "value"}], "system"?}
nemo             {"conversations": [{"from", "value"}], "mask", "system"?}: NeMo's chat format
prompt           {"prompt", "completion"|"response"}, or NeMo's {"input", "output"}: prompt and completion
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.bad_records import REFUSE, BadRecords
from nemo_minitron.data.chat.conversations import Conversation, check_messages
from nemo_minitron.data.records import Record, read_records
from nemo_minitron.errors import InputError

AUTO = "auto"
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """How a format is known, how a line becomes lists of messages, and the keys that are used up by that."""

    fits: Callable[[_Row], bool]
    convert: Callable[[_Row, str], list[list[Any]]]
    keys: tuple[str, ...]


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"))


def convert_file(
    path: str | Path, format: str = AUTO, bad: BadRecords | None = None
) -> Iterator[Conversation]:
    """The conversations of a file in one of the formats, checked; `where` keeps the line that each came from.

    Args:
        format: of every line; "auto" takes that of the first line for the whole file.
        bad: an account of several files, which the caller ends; null: bad records of this one are refused.

    Raises:
        InputError: names file and line: an unknown format, a line of another one, or what `check_messages` refuses;
            also a file without a sample.
    """
    if format != AUTO and format not in FORMATS:
        raise InputError(f"format={format}: must be {AUTO} or one of {', '.join(FORMATS)}")
    own, read = bad or BadRecords(REFUSE, str(path)), 0

    def converted(record: Record) -> list[Conversation]:
        nonlocal format
        if format == AUTO:
            format = detect_format(record.value, record.where)
        return convert_row(record.value, format, record.where)

    for samples in own.good(read_records(path), converted):
        yield from samples
        read += len(samples)
    if bad is None:
        own.finish()
    if not read and not own.bad:
        raise InputError(f"{path}: holds no conversation")


def detect_format(row: _Row, where: str) -> str:
    """The format that a line has by its keys.

    Raises:
        InputError: none, or more than one.
    """
    found = [name for name, format in FORMATS.items() if format.fits(row)]
    if len(found) != 1:
        what = f"could be {' or '.join(found)}; choose one with format=" if found else "no known format"
        raise InputError(
            f"{where}: {what} (it has the keys {', '.join(map(str, list(row)[:8]))}; formats: {', '.join(FORMATS)})"
        )
    return found[0]


def convert_row(row: _Row, format: str, where: str) -> list[Conversation]:
    """The conversations of one line.

    Raises:
        InputError: the line has another format, or is no conversation; see `check_messages`.
    """
    known = FORMATS[format]
    if not known.fits(row):
        raise InputError(
            f"{where}: is not of format {format} (it has the keys {', '.join(map(str, list(row)[:8]))})"
        )
    extra = {name: value for name, value in row.items() if name not in known.keys}
    return [
        Conversation(check_messages(messages, where), where, extra) for messages in known.convert(row, where)
    ]


def _text(value: Any, where: str, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key}: must be a string, found {type(value).__name__}")
    return value


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(row: _Row, where: str) -> list[dict[str, Any]]:
    text = _text(row.get("system"), where, "system")
    return [_turn("system", text)] if text.strip() else []


# ---- messages ------------------------------------------------------------------------------------------------


def _messages(row: _Row, where: str) -> list[list[Any]]:
    if not isinstance(row["messages"], list):
        raise InputError(f"{where}: messages: must be a list")
    messages = [_openai(message, f"{where}, message {n}") for n, message in enumerate(row["messages"], 1)]
    return [_with_tools(messages, row.get("tools"), where)]


def _openai(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if calls:
        if not isinstance(calls, list):
            raise InputError(f"{where}: tool_calls: must be a list")
        content = "\n".join([*([content] if content else []), *(_call(call, where) for call in calls)])
    role = {"developer": "system", "function": "tool"}.get(str(message.get("role")), message.get("role"))
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: content: only parts of type 'text' can be converted")
    return str(part["text"])


def _call(call: Any, where: str) -> str:
    """`{"name": ..., "arguments": {...}}`; OpenAI keeps the arguments as JSON inside of a string."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: tool_calls: each must have a function with a name")
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise InputError(f"{where}: tool_calls: arguments of {function['name']} are not JSON") from None
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _with_tools(messages: list[Any], tools: Any, where: str) -> list[Any]:
    if not tools:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{where}: tools: must be a list of objects")
    text = "Tools:\n" + "\n".join(json.dumps(t.get("function", t), ensure_ascii=False) for t in tools)
    first = messages[0] if messages else None
    if isinstance(first, dict) and first["role"] == "system" and isinstance(first["content"], str):
        return [_turn("system", f"{first['content']}\n{text}"), *messages[1:]]
    return [_turn("system", text), *messages]


# ---- instructions --------------------------------------------------------------------------------------------


def _instruction(instruction: Any, given: Any, where: str) -> dict[str, Any]:
    parts = _text(instruction, where, "instruction"), _text(given, where, "input")
    return _turn("user", "\n\n".join(part for part in parts if part.strip()))


def _alpaca(row: _Row, where: str) -> list[list[Any]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(h, list) and len(h) == 2 for h in history):
        raise InputError(f"{where}: history: must be a list of [question, answer]")
    turns = [turn for q, a in history for turn in (_turn("user", q), _turn("assistant", a))]
    last = [_instruction(row["instruction"], row.get("input"), where), _turn("assistant", row["output"])]
    return [[*_system(row, where), *turns, *last]]


def _self_instruct(row: _Row, where: str) -> list[list[Any]]:
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(i, Mapping) for i in instances):
        raise InputError(f"{where}: instances: must be a list of at least one {{input, output}}")
    return [
        [
            _instruction(row["instruction"], instance.get("input"), where),
            _turn("assistant", instance.get("output")),
        ]
        for instance in instances
    ]


def _pair_of(row: _Row) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)


def _prompt(row: _Row, where: str) -> list[list[Any]]:
    pair = _pair_of(row)
    assert pair is not None
    question, answer = pair
    return [[*_system(row, where), _turn("user", row[question]), _turn("assistant", row[answer])]]


# ---- conversations -------------------------------------------------------------------------------------------


def _speakers(row: _Row, where: str) -> list[tuple[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: conversations: must be a list of at least one {{from, value}}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
            raise InputError(f"{where}, message {number}: must be an object with from and value")
    return [(turn["from"], turn.get("value")) for turn in turns]


def _sharegpt(row: _Row, where: str) -> list[list[Any]]:
    # A name that is none of these goes on to `check_messages`, which refuses it.
    turns = [_turn(_SHAREGPT_ROLES.get(name.lower(), name), value) for name, value in _speakers(row, where)]
    return [[*_system(row, where), *turns]]


def _nemo(row: _Row, where: str) -> list[list[Any]]:
    """NeMo's names are free: those in `mask`, split at commas, are not trained on; the others are the assistant's."""
    if row.get("type") is not None:
        raise InputError(f"{where}: type={row['type']!r}: attribute labels (SteerLM) cannot be converted")
    masked = [name.strip() for name in _text(row["mask"], where, "mask").split(",")]
    speakers = _speakers(row, where)
    for name in masked:
        if name not in (speaker for speaker, _ in speakers):
            raise InputError(f"{where}: mask={row['mask']!r}: {name!r} does not speak")
    turns = [_turn(_nemo_role(name, name in masked), value) for name, value in speakers]
    return [[*_system(row, where), *turns]]


def _nemo_role(name: str, masked: bool) -> str:
    if not masked:
        return "assistant"
    return "tool" if name.lower() == "tool" else "user"


def _has(*keys: str) -> Callable[[_Row], bool]:
    return lambda row: all(key in row for key in keys)


FORMATS = {
    "messages": Shape(_has("messages"), _messages, ("messages", "tools")),
    "alpaca": Shape(
        _has("instruction", "output"), _alpaca, ("instruction", "input", "output", "system", "history")
    ),
    "self_instruct": Shape(_has("instruction", "instances"), _self_instruct, ("instruction", "instances")),
    "sharegpt": Shape(
        lambda row: "conversations" in row and "mask" not in row, _sharegpt, ("conversations", "system")
    ),
    "nemo": Shape(_has("conversations", "mask"), _nemo, ("conversations", "mask", "system", "type")),
    "prompt": Shape(
        lambda row: "instruction" not in row and _pair_of(row) is not None,
        _prompt,
        ("system", "prompt", "completion", "response", "input", "output"),
    ),
}
