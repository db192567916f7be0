"""Conversations: what one is, files of them, and the refusal of those that cannot be trained on.

A line of a file is `{"messages": [{"role": ..., "content": ...}, ...], ...}`; a line of a preference file
`{"messages": [the prompt], "chosen": "...", "rejected": "...", "chosen_reward": ..., "rejected_reward": ...}`. Other
keys are kept. Other formats are converted by `data.chat.formats`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.data.bad_records import REFUSE, BadRecords, each_file
from nemo_minitron.data.records import Record, read_records
from nemo_minitron.errors import InputError
from nemo_minitron.files import replacing

ROLES = ("system", "user", "assistant", "tool")
# Who may speak after whom; "" is the beginning.
_AFTER = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# Blank lines before a text would melt into the line end before it, which a tokenizer may join to one token.
_BLANK_START = re.compile(r"\A(?:[^\S\n]*\n)+")

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        messages: `{"role": ..., "content": ...}` each; a system message first or not at all, then user and assistant
            by turns, where an assistant's call may be followed by `tool` results.
        where: file and line, for refusals.
        extra: the other keys of the line.
    """

    messages: list[Message]
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A line of a file."""
        return {"messages": self.messages, **self.extra}


@dataclass(frozen=True)
class Preference:
    """A prompt, which ends with the user or a tool, and two answers to it. `*_reward`: None where none is given."""

    messages: list[Message]
    chosen: str
    rejected: str
    where: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A line of a file."""
        rewards = {"chosen_reward": self.chosen_reward, "rejected_reward": self.rejected_reward}
        given = {name: value for name, value in rewards.items() if value is not None}
        return {
            "messages": self.messages,
            "chosen": self.chosen,
            "rejected": self.rejected,
            **given,
            **self.extra,
        }


def system_in_user(messages: list[Message]) -> list[Message]:
    """With the system's text in front of the user's first, for templates that know no system."""
    first, *rest = messages
    if first["role"] != "system" or not rest:
        return messages
    text = "\n\n".join(part for part in (first["content"], rest[0]["content"]) if part.strip())
    return [{"role": "user", "content": text}, *rest[1:]]


SampleT = TypeVar("SampleT", Conversation, Preference)


def merged(samples: Iterable[SampleT], merge_system: bool) -> Iterator[SampleT]:
    """The samples; with `merge_system` as `system_in_user` makes them."""
    for sample in samples:
        yield replace(sample, messages=system_in_user(sample.messages)) if merge_system else sample


def clean(text: str) -> str:
    """Without blank lines before it and white space after it; an indented first line keeps its indent."""
    return _BLANK_START.sub("", text).rstrip()


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one object a line, atomically, in UTF-8; returns the path."""
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # Parquet has times and decimals, of which JSON knows nothing.
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        file.flush()
    return path


def check_messages(messages: Any, where: str, *, ends_with: Sequence[str] = ("assistant",)) -> list[Message]:
    """The messages, cleaned, where they are a conversation.

    Args:
        where: what a refusal begins with, "FILE, line N".
        ends_with: the roles that may speak last: the assistant in a sample, the user or a tool in a prompt.

    Raises:
        InputError: no list of messages, an unknown role, a text that is empty or no text, or speakers out of turn
            (the assistant first, twice the same, a system message that is not the first).
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages: must be a list of at least one {{role, content}}")
    found: list[Message] = []
    for number, message in enumerate(messages, start=1):
        found.append(_checked(message, found[-1]["role"] if found else "", f"{where}, message {number}"))
    if found[-1]["role"] not in ends_with:
        raise InputError(
            f"{where}: ends with the {found[-1]['role']}'s turn; the last must be {' or '.join(ends_with)}"
        )
    return found


def _checked(message: Any, before: str, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if role not in _AFTER[before]:
        after = f"after the {before}'s turn" if before else "at the start"
        raise InputError(f"{where}: {role} {after}; legal there: {' or '.join(_AFTER[before])}")
    text = message.get("content")
    if not isinstance(text, str):
        raise InputError(f"{where}: content: must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: content holds an unpaired surrogate escape, which is no text") from None
    text = clean(text)
    if not text.strip() and role != "system":
        raise InputError(f"{where}: the {role}'s {'answer' if role == 'assistant' else 'text'} is empty")
    return {"role": role, "content": text}


def read_conversations(path: str | Path) -> list[Conversation]:
    """All samples of a file of `messages`, checked.

    Raises:
        InputError: names the file and the line; also where the file holds no sample.
    """
    found = list(each_file([str(path)], _conversations, BadRecords(REFUSE, str(path))))
    if not found:
        raise InputError(f"{path}: holds no conversation")
    return found


def _conversations(path: str, bad: BadRecords) -> Iterator[Conversation]:
    return bad.good(read_records(path), _conversation)


def _conversation(record: Record) -> Conversation:
    extra = {name: value for name, value in record.value.items() if name != "messages"}
    return Conversation(check_messages(record.value.get("messages"), record.where), record.where, extra)


_PREFERENCE_KEYS = ("messages", "chosen", "rejected", "chosen_reward", "rejected_reward")


def read_preferences(path: str | Path, bad: BadRecords | None = None) -> Iterator[Preference]:
    """The pairs of a preference file, checked.

    Args:
        bad: an account of several files, which the caller ends; null: bad records of this one are refused.

    Raises:
        InputError: names the file and the line: as `check_messages` for the prompt; an answer that is empty or no text,
            two equal answers, a reward that is no number, or one of the two rewards alone.
    """
    own = bad or BadRecords(REFUSE, str(path))
    found = False
    for pair in own.good(read_records(path), lambda record: _preference(record.value, record.where)):
        yield pair
        found = True
    if bad is None:
        own.finish()
    if not found and not own.bad:
        raise InputError(f"{path}: holds no pair of answers")


def _preference(row: dict[str, Any], where: str) -> Preference:
    messages = check_messages(row.get("messages"), where, ends_with=("user", "tool"))
    answers = {}
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{where}: {name}: must be a text that is not empty")
        answers[name] = _checked({"role": "assistant", "content": row[name]}, "user", f"{where}, {name}")[
            "content"
        ]
    if answers["chosen"] == answers["rejected"]:
        raise InputError(f"{where}: chosen and rejected are the same answer")
    chosen_reward, rejected_reward = (
        _reward(row, name, where) for name in ("chosen_reward", "rejected_reward")
    )
    if (chosen_reward is None) != (rejected_reward is None):
        raise InputError(f"{where}: chosen_reward and rejected_reward: both or neither must be there")
    extra = {name: value for name, value in row.items() if name not in _PREFERENCE_KEYS}
    return Preference(
        messages, answers["chosen"], answers["rejected"], where, chosen_reward, rejected_reward, extra
    )


def _reward(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {name}={value!r}: must be a number")
    return float(value)
