"""What the four categories share: a draft of a sample, and skills with their wordings by split.

A template family is one wording of one skill. Each belongs to one split, whatever the seed, so that no wording that is
scored was ever trained on.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.data.chat.conversations import Message
from nemo_minitron.data.instruct.checks import Check

# Words that a byte-level BPE of program text has as one token: what is learned here is to follow, not to spell.
# fmt: off
WORDS = (
    "file", "name", "list", "value", "key", "line", "path", "type", "code", "time", "text", "data",
    "number", "string", "node", "module", "class", "method", "event", "message", "result", "format",
    "option", "command", "header", "object", "function", "argument", "error", "context",
)
NAMES = (
    "Ann", "Bob", "Max", "Tom", "Ian", "Eve", "Sam", "Lee", "Dan", "Kim", "Ray", "Joe", "Amy", "Leo",
    "Ben", "Zoe", "Tim", "Pat", "Gus", "Ivy",
)
TOWNS = ("Rome", "Paris", "London", "Oslo", "Lima", "Berlin", "Porto", "Lyon", "Cairo", "Delhi")
# fmt: on


@dataclass(frozen=True)
class Draft:
    """A prompt, its answer, what decides on answers, answers that break a check each, and what decides leniently."""

    messages: list[Message]
    answer: str
    checks: list[Check]
    wrong: list[str]
    lenient: list[Check]


@dataclass(frozen=True)
class Skill:
    """Something to learn. `wordings`: by split; `draft` fills one of them in."""

    category: str
    name: str
    wordings: Mapping[str, Sequence[Any]]
    draft: Callable[[random.Random, Any], Draft]


@dataclass(frozen=True)
class Family:
    """One wording of one skill, all of whose samples are in one split."""

    skill: Skill
    split: str
    number: int

    @property
    def name(self) -> str:
        """Such as "passage/code/test-0"."""
        return f"{self.skill.category}/{self.skill.name}/{self.split}-{self.number}"

    def draft(self, rng: random.Random) -> Draft:
        """One sample."""
        return self.skill.draft(rng, self.skill.wordings[self.split][self.number])


def user(text: str) -> Message:
    """The user's turn."""
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    """The system's turn."""
    return {"role": "system", "content": text}


def assistant(text: str) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": text}
