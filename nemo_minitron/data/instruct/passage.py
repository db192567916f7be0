"""Answers from a given passage: a few facts, a question about one of them, or about none of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_minitron.data.instruct.template_families import NAMES, TOWNS, WORDS, Draft, Skill, user

_CATEGORY = "passage"
UNKNOWN = "unknown"
# How the strict score lets a fact be said.
_FORMS = ("{}", "a {}", "the {}", "in {}")
# How often the passage does not have the answer.
_UNANSWERABLE = 0.15


@dataclass(frozen=True)
class _Wording:
    """`whole` holds {facts}, {question} and, as for all of them, says what to answer where the passage does not."""

    whole: str
    fact: str
    question: str


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10, 100), count)]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(WORDS, count)


def _towns(rng: random.Random, count: int) -> list[str]:
    return rng.sample(TOWNS, count)


def _drafter(
    values_of: Callable[[random.Random, int], list[str]],
) -> Callable[[random.Random, _Wording], Draft]:
    def draft(rng: random.Random, wording: _Wording) -> Draft:
        count = rng.randint(2, 4)
        *names, absent = rng.sample(NAMES, count + 1)
        values = values_of(rng, count)
        index = rng.randrange(count)
        asked, answer = names[index], values[index]
        if rng.random() < _UNANSWERABLE:
            asked, answer = absent, UNKNOWN
        facts = " ".join(wording.fact.format(name=n, value=v) for n, v in zip(names, values, strict=True))
        distractors = [value for value in [*values, UNKNOWN] if value != answer]
        text = wording.whole.format(facts=facts, question=wording.question.format(name=asked))
        return Draft(
            [user(text)],
            answer,
            [
                {"kind": "contains", "text": answer},
                {"kind": "lacks", "texts": distractors},
                {"kind": "is", "texts": [form.format(answer) for form in _FORMS]},
            ],
            [*distractors, f"{distractors[0]} {answer}", facts],
            [_lenient(answer, [*distractors, *(name for name in names if name != asked)])],
        )

    return draft


def _lenient(answer: str, others: list[str]) -> dict[str, Any]:
    """Neither another fact of the passage nor another person of it belongs into the answer."""
    if answer == UNKNOWN:
        return {"kind": "says_unknown", "others": others, "pool": [*WORDS, *TOWNS]}
    if answer in TOWNS:
        return {"kind": "says", "text": answer, "others": [*others, *(t for t in TOWNS if t != answer)]}
    return {"kind": "says", "text": answer, "others": others, "pool": list(WORDS) if answer in WORDS else []}


_ASK = "Read this: {facts} If it is not there, say unknown. {question}"
_TEXT = "Text: {facts}\nQuestion: {question}\nAnswer from the text, or say unknown."
_USE = "Use only this text, or say unknown.\n{facts}\n{question}"

SKILLS = [
    Skill(
        _CATEGORY,
        "code",
        {
            "train": [
                _Wording(_ASK, "The code of {name} is {value}.", "What is the code of {name}?"),
                _Wording(_TEXT, "{name} has the code {value}.", "Which code has {name}?"),
                _Wording(_USE, "{name}: code {value}.", "Tell me the code of {name}."),
                _Wording(_TEXT, "{value} is the code of {name}.", "What is the code of {name}?"),
                _Wording(_USE, "The number of {name} is {value}.", "What is the number of {name}?"),
                _Wording(_ASK, "{name} has the number {value}.", "Which number has {name}?"),
            ],
            "valid": [_Wording(_ASK, "The code for {name} is {value}.", "What is the code for {name}?")],
            "test": [
                _Wording(_USE, "{name} has code {value}.", "What is the code that {name} has?"),
                _Wording(_TEXT, "The number for {name} is {value}.", "Tell me the number for {name}."),
            ],
        },
        _drafter(_numbers),
    ),
    Skill(
        _CATEGORY,
        "thing",
        {
            "train": [
                _Wording(_ASK, "{name} has a {value}.", "What does {name} have?"),
                _Wording(_TEXT, "The {value} is of {name}.", "What is of {name}?"),
                _Wording(_USE, "{name} got the {value}.", "What did {name} get?"),
                _Wording(_TEXT, "{name} will use a {value}.", "What will {name} use?"),
                _Wording(_USE, "{name}: one {value}.", "What is there for {name}?"),
                _Wording(_ASK, "{name} must read the {value}.", "What must {name} read?"),
            ],
            "valid": [_Wording(_TEXT, "{name} has one {value}.", "What has {name}?")],
            "test": [
                _Wording(_USE, "{name} must use the {value}.", "What must {name} use?"),
                _Wording(_ASK, "{name} got a {value}.", "What is it that {name} got?"),
            ],
        },
        _drafter(_words),
    ),
    Skill(
        _CATEGORY,
        "town",
        {
            "train": [
                _Wording(_ASK, "{name} lives in {value}.", "Where does {name} live?"),
                _Wording(_TEXT, "{name} is in {value}.", "Where is {name}?"),
                _Wording(_USE, "{name} comes from {value}.", "Where does {name} come from?"),
                _Wording(_TEXT, "The home of {name} is {value}.", "Where is the home of {name}?"),
                _Wording(_USE, "{name} went to {value}.", "Where did {name} go?"),
            ],
            "valid": [_Wording(_USE, "The town of {name} is {value}.", "What is the town of {name}?")],
            "test": [
                _Wording(_TEXT, "{name} has a home in {value}.", "Where does {name} have a home?"),
                _Wording(_ASK, "{name} is now in {value}.", "Where is {name} now?"),
            ],
        },
        _drafter(_towns),
    ),
]
