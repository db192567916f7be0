"""Checks of an answer that a program can decide, as data: `{"kind": ..., ...}` in a sample's `checks`.

Case does not count, but in `equals`, `upper` and calls.

is           `texts`: the answer is one of them; a full stop after it does not count
equals       `text`: exactly that
starts_with, ends_with, contains   `text`; `contains` wants it as whole words
lacks        `texts`: none of them is there as whole words
repeats      `text`, `count`: the answer is that word so many times and nothing else
words        `most`: no more words than that
upper        no lower-case letter
call_json    an object with a `name` and an object of `arguments`, nothing else, no key twice
call_name    `name`: it calls that
call_schema  `schema`: the arguments satisfy this JSON schema
call_arguments  `arguments`: they are these
says, says_unknown, writes, writes_often, gives_call   of a sample's `lenient` checks: see `data.instruct.lenient`
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_minitron.data.instruct import lenient
from nemo_minitron.data.instruct.schema import violation
from nemo_minitron.errors import InputError

Check = dict[str, Any]


def passed(check: Mapping[str, Any], answer: str, where: str = "check") -> bool:
    """Whether an answer satisfies one check; white space around the answer does not count.

    Raises:
        InputError: a check of an unknown kind, or without what its kind needs.
    """
    kind = check.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: unknown kind of check {kind!r}; known: {', '.join(KINDS)}")
    try:
        return KINDS[kind](answer.strip(), check)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: check {json.dumps(check)[:120]}: cannot be decided ({error})") from None


def share_passed(checks: Sequence[Mapping[str, Any]], answer: str, where: str = "check") -> float:
    """The share of the checks that an answer satisfies, in [0, 1]; 1.0 is a right answer.

    Raises:
        InputError: as `passed`; also where there is no check.
    """
    if not checks:
        raise InputError(f"{where}: has no checks to score an answer with")
    return sum(passed(check, answer, where) for check in checks) / len(checks)


def _has_words(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text.casefold())}(?!\w)", answer.casefold()) is not None


def _is(answer: str, texts: Sequence[str]) -> bool:
    said = " ".join(answer.casefold().split())
    return any(said in (text, f"{text}.") for text in (" ".join(t.casefold().split()) for t in texts))


def call_of(answer: str) -> dict[str, Any] | None:
    """The call that an answer is: an object with `name` and `arguments`, no key twice; None where it is none."""
    try:
        call = json.loads(answer, object_pairs_hook=lenient.unique_keys)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None
    return call if isinstance(call["name"], str) and isinstance(call["arguments"], dict) else None


def _call_is(answer: str, decide: Callable[[dict[str, Any]], bool]) -> bool:
    call = call_of(answer)
    return call is not None and decide(call)


def _same(a: Any, b: Any) -> bool:
    """JSON's equality: 1 is not true."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


KINDS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "is": lambda answer, c: _is(answer, c["texts"]),
    "starts_with": lambda answer, c: answer.casefold().startswith(c["text"].casefold()),
    "ends_with": lambda answer, c: answer.casefold().endswith(c["text"].casefold()),
    "contains": lambda answer, c: _has_words(answer, c["text"]),
    "equals": lambda answer, c: answer == c["text"],
    "lacks": lambda answer, c: not any(_has_words(answer, text) for text in c["texts"]),
    "repeats": lambda answer, c: answer.casefold().split() == [c["text"].casefold()] * c["count"],
    "words": lambda answer, c: 0 < len(answer.split()) <= c["most"],
    "upper": lambda answer, c: answer.isupper(),
    "call_json": lambda answer, c: call_of(answer) is not None,
    "call_name": lambda answer, c: _call_is(answer, lambda call: call["name"] == c["name"]),
    "call_schema": lambda answer, c: _call_is(
        answer, lambda call: violation(call["arguments"], c["schema"]) is None
    ),
    "call_arguments": lambda answer, c: _call_is(
        answer, lambda call: _same(call["arguments"], c["arguments"])
    ),
    **lenient.KINDS,
}
