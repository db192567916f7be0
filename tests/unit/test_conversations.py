"""Conversations: what is refused, with file and line; and the formats of others, against conversions by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.conversations import clean, read_conversations, read_preferences, write_jsonl
from nemo_minitron.data.chat.formats import convert_file
from nemo_minitron.errors import InputError


def u(text: Any = "Hello?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: Any = "Yes.") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def s(text: Any = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def file_of(directory: Path, *rows: Any) -> Path:
    """A file whose first line is a good sample, the second blank, and the third what is tried."""
    return write_jsonl(directory / "in.jsonl", rows)


def refusal(path: Path, format: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        list(convert_file(path, format))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


BAD_MESSAGES = {
    "starts with the assistant": ([a(), u(), a()], ["message 1", "assistant at the start", "user"]),
    "system, then the assistant": ([s(), a()], ["message 2", "assistant after the system's turn"]),
    "unknown role": (
        [u(), {"role": "bot", "content": "x"}],
        ["message 2", "'bot'", "system, user, assistant"],
    ),
    "no role": ([{"content": "x"}], ["message 1", "unknown role None"]),
    "empty answer": ([u(), a(" \n ")], ["message 2", "the assistant's answer is empty"]),
    "empty question": ([u(""), a()], ["message 1", "the user's text is empty"]),
    "twice the user": ([u(), u(), a()], ["message 2", "user after the user's turn"]),
    "twice the assistant": ([u(), a(), a()], ["message 3", "assistant after the assistant's turn"]),
    "a late system message": ([u(), a(), s(), u(), a()], ["message 3", "system after the assistant's turn"]),
    "no answer at the end": ([u(), a(), u()], ["ends with the user's turn", "assistant"]),
    "no messages": ([], ["messages", "at least one"]),
    "a message that is a text": (["hello"], ["message 1", "role and content"]),
    "content that is a number": ([u(), a(3)], ["message 2", "must be a string", "int"]),
    "content that is null": ([u(), a(None)], ["message 2", "must be a string", "NoneType"]),
    "half a surrogate pair": ([u("\ud83d"), a()], ["message 1", "surrogate"]),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_what_is_no_conversation_is_refused_by_file_and_line(case: str, tmp_path: Path) -> None:
    messages, parts = BAD_MESSAGES[case]
    path = tmp_path / "in.jsonl"
    good = json.dumps({"messages": [u(), a()]})
    path.write_text(f"{good}\n\n{json.dumps({'messages': messages})}\n")
    for message in (refusal(path), _refused(read_conversations, path)):
        assert message.startswith(f"{path}, line 3")
        for part in parts:
            assert part in message


def _refused(read: Any, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    return str(caught.value)


BAD_LINES = {
    b"{": "not JSON",
    b"[1]": "expected a JSON object, found list",
    b"\xff\xfe": "not UTF-8 (byte 0: 0xff)",
    b'{"texts": 1}': "no known format (it has the keys texts",
    b'{"messages": [], "instruction": "", "output": ""}': "could be messages or alpaca",
    b'{"conversations": [{"value": "x"}]}': "message 1: must be an object with from and value",
    b'{"conversations": [{"from": "human", "value": "x"}, {"from": "narrator", "value": "y"}]}': "'narrator'",
    b'{"conversations": [{"from": "User", "value": "x"}], "mask": "Human"}': "'Human' does not speak",
    b'{"conversations": [{"from": "User", "value": "x"}], "mask": "User", "type": "TEXT_TO_VALUE"}': "SteerLM",
    b'{"instruction": "x", "instances": []}': "instances: must be a list of at least one",
    b'{"instruction": "x", "output": "y", "history": ["z"]}': "history: must be a list of [question, answer]",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "only parts of type 'text'",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_has_no_format_is_refused(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line + b"\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 1")
    assert BAD_LINES[line] in message


def test_files_without_samples_and_choices_that_are_none_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert "holds no conversation" in refusal(empty)
    assert "cannot be read" in refusal(tmp_path / "absent.jsonl")
    assert "alpaca, self_instruct, sharegpt" in refusal(empty, "csv")
    mixed = file_of(tmp_path, {"messages": [u(), a()]}, {"instruction": "x", "output": "y"})
    assert "line 2: is not of format messages" in refusal(mixed)
    assert "line 1: is not of format alpaca" in refusal(mixed, "alpaca")


FORMATS: dict[str, tuple[dict[str, Any], list[list[tuple[str, str]]]]] = {
    "messages": (
        {"messages": [{"role": "developer", "content": "S"}, u("Q"), a([{"type": "text", "text": "A"}])]},
        [[("system", "S"), ("user", "Q"), ("assistant", "A")]],
    ),
    "messages with tools": (
        {
            "messages": [
                u("Q"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "3"},
                a("It is 3."),
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        },
        [
            [
                ("system", 'Tools:\n{"name": "add", "parameters": {}}'),
                ("user", "Q"),
                ("assistant", '{"name": "add", "arguments": {"a": 1}}'),
                ("tool", "3"),
                ("assistant", "It is 3."),
            ]
        ],
    ),
    "alpaca": (
        {"instruction": "I", "input": "X", "output": "A", "system": "S", "history": [["Q0", "A0"]]},
        [[("system", "S"), ("user", "Q0"), ("assistant", "A0"), ("user", "I\n\nX"), ("assistant", "A")]],
    ),
    "alpaca without input": (
        {"instruction": "I", "input": "", "output": "A"},
        [[("user", "I"), ("assistant", "A")]],
    ),
    "self_instruct": (
        {
            "instruction": "I",
            "instances": [{"input": "", "output": "A"}, {"input": "X", "output": "B"}],
        },
        [[("user", "I"), ("assistant", "A")], [("user", "I\n\nX"), ("assistant", "B")]],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
        [[("system", "S"), ("user", "Q"), ("assistant", "A")]],
    ),
    "nemo": (
        {
            "system": "S",
            "mask": "Student,Tool",
            "conversations": [
                {"from": "Student", "value": "Q"},
                {"from": "Guide", "value": "A"},
                {"from": "Tool", "value": "3"},
                {"from": "Guide", "value": "B"},
            ],
        },
        [[("system", "S"), ("user", "Q"), ("assistant", "A"), ("tool", "3"), ("assistant", "B")]],
    ),
    "prompt": ({"prompt": "Q", "completion": "A"}, [[("user", "Q"), ("assistant", "A")]]),
    "NeMo's prompt": ({"input": "Q", "output": "A"}, [[("user", "Q"), ("assistant", "A")]]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_and_converted(name: str, tmp_path: Path) -> None:
    row, expected = FORMATS[name]
    path = file_of(tmp_path, {**row, "id": 7})
    format = "prompt" if name == "NeMo's prompt" else name.split()[0]
    for choice in ("auto", format):
        found = list(convert_file(path, choice))
        assert [[(m["role"], m["content"]) for m in c.messages] for c in found] == expected
        assert all(c.extra == {"id": 7} and c.where == f"{path}, line 1" for c in found)


def test_a_converted_file_is_read_again(tmp_path: Path) -> None:
    path = file_of(tmp_path, FORMATS["nemo"][0], FORMATS["nemo"][0])
    written = write_jsonl(tmp_path / "out.jsonl", (c.to_json() for c in convert_file(path)))
    again = read_conversations(written)
    assert [c.messages for c in again] == [c.messages for c in convert_file(path)]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_line_separator_inside_a_text_is_no_line_end(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"messages": [u("a\u2028b"), a("c\nd")]})
    (found,) = read_conversations(path)
    assert found.messages == [u("a\u2028b"), a("c\nd")]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\n\n  x\n", "  x"),
        ("  \n\t\nx  y \n", "x  y"),
        ("x\n\ny", "x\n\ny"),
        ("", ""),
        ("    return", "    return"),
    ],
)
def test_cleaning_keeps_the_indent_and_what_is_inside(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


BAD_PAIRS = {
    "ends with the assistant": ({"messages": [u(), a()]}, "ends with the assistant's turn"),
    "no chosen answer": ({"chosen": None}, "chosen: must be a text"),
    "an empty rejected answer": ({"rejected": " "}, "rejected: must be a text that is not empty"),
    "equal answers": ({"rejected": "right\n"}, "the same answer"),
    "one reward": ({"chosen_reward": 1.0}, "both or neither"),
    "a reward that is a text": (
        {"chosen_reward": "1", "rejected_reward": 0},
        "chosen_reward='1': must be a number",
    ),
    "a reward that is not finite": (
        {"chosen_reward": 1, "rejected_reward": float("nan")},
        "must be a number",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_pair_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    good = {"messages": [u()], "chosen": "right", "rejected": "wrong"}
    changes, part = BAD_PAIRS[case]
    message = _refused(
        lambda path: list(read_preferences(path)), file_of(tmp_path, good, {**good, **changes})
    )
    assert message.startswith(f"{tmp_path / 'in.jsonl'}, line 2")
    assert part in message


def test_a_pair_is_read(tmp_path: Path) -> None:
    row = {
        "messages": [s(), u()],
        "chosen": "right",
        "rejected": "wrong",
        "chosen_reward": 1,
        "rejected_reward": 0.25,
        "id": "x",
    }
    (pair,) = read_preferences(file_of(tmp_path, row))
    assert (pair.chosen, pair.rejected, pair.chosen_reward, pair.rejected_reward) == (
        "right",
        "wrong",
        1.0,
        0.25,
    )
    assert pair.to_json() == row
