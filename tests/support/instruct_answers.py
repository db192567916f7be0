"""Right paraphrases and wrong answers for the project's own instruct set, made from its samples by rules."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from nemo_minitron.data.instruct.persona import _JOBS as JOBS
from nemo_minitron.data.instruct.template_families import NAMES, TOWNS, WORDS

Sample = dict[str, Any]

_INSTRUCTION = {
    "repeat": ["{list}.", '"{answer}"', "Sure! {answer}", "{list}!", "`{answer}`", "Here you go: {answer}"],
    "end": ["Sure: {answer}", '"{answer}"', "`{answer}`", "Here it is: {answer}", "Of course! {answer}"],
    "around": [
        "Sure: {answer}",
        '"{answer}"',
        "`{answer}`",
        "Here it is: {answer}",
        "{spaced}",
        "Okay: {answer}",
    ],
    "join": ["Sure: {answer}", '"{answer}"', "`{answer}`", "The result is: {answer}", "```\n{answer}\n```"],
    "upper": [
        "{answer}.",
        '"{answer}"',
        "Sure! {answer}",
        "The word in upper case: {answer}",
        "**{answer}**",
    ],
    "avoid": [
        "{answer}!",
        '"{answer}"',
        "I choose {answer}.",
        "I would say {answer}.",
        "My choice is {answer}.",
    ],
}
_PERSONA = {
    "name": [
        "My name is {f}.",
        "I'm {f}!",
        "They call me {f}.",
        "You can call me {f}.",
        "It's {f}.",
        "{f}, at your service.",
    ],
    "job": [
        "I work as a {f}.",
        "I'm a {f}!",
        "My job is {f}.",
        "I am the {f} here.",
        "{f}.",
        "I earn my living as a {f}.",
    ],
    "town": [
        "I'm from {f}.",
        "My home is {f}.",
        "I live in {f}.",
        "{f} is where I come from.",
        "{f}!",
        "From {f}, my friend.",
    ],
}
_PASSAGE = {
    "code": [
        "It is {a}.",
        "The number of {n} is {a}.",
        "{n}'s code is {a}.",
        "{n} has {a}.",
        "{a}, as the text says.",
        "**{a}**",
        "Answer: {a}",
        "According to the text, it's {a}.",
        "Sure! The code is {a}.",
    ],
    "thing": [
        "It is the {a}.",
        "{n} has the {a}.",
        "The {a}, of course.",
        "A {a}.",
        "Answer: {a}",
        "That would be the {a}.",
        '"{a}"',
        "According to the text, the {a}.",
    ],
    "town": [
        "In {a}.",
        "{n} is in {a}.",
        "{n} lives in {a}.",
        "{a}, as the text says.",
        "Answer: {a}",
        "It's {a}.",
        "The text says {a}.",
        "You will find {n} in {a}.",
    ],
    "unknown": [
        "Unknown.",
        "It is unknown.",
        "The text does not say.",
        "That is not in the text.",
        "I don't know.",
        "There is no information about {n}.",
        "{n} is not mentioned.",
        "It isn't stated.",
        "The text doesn't mention {n}.",
        "Not given.",
        "I cannot tell from the text.",
    ],
}
_CALLS: list[Callable[[str, dict[str, Any]], str]] = [
    lambda a, c: json.dumps(c, indent=2),
    lambda a, c: f"```json\n{a}\n```",
    lambda a, c: f"Here is the call:\n{a}",
    lambda a, c: json.dumps(c, separators=(",", ":")),
    lambda a, c: json.dumps({"arguments": c["arguments"], "name": c["name"]}),
    lambda a, c: json.dumps({"name": c["name"], "parameters": c["arguments"]}),
    lambda a, c: json.dumps({"type": "function", "function": c}),
    lambda a, c: f"Sure!\n```\n{a}\n```\nThis does it.",
]


def skill(sample: Sample) -> str:
    return str(sample["family"].split("/")[1])


def asked(sample: Sample) -> str:
    """What a persona is asked for: name, job or town; the person that a passage is asked about."""
    answer = sample["messages"][-1]["content"]
    if sample["category"] == "persona":
        return "name" if fact(answer) in NAMES else "job" if fact(answer) in JOBS else "town"
    question = sample["messages"][-2]["content"].splitlines()
    text = question[-1] if "Answer from the text" not in question[-1] else question[-2]
    return next(
        name
        for name in NAMES
        if name in text.split(".")[-1] or name in text.split("unknown.")[-1].split("?")[0].split(". ")[-1]
    )


def fact(answer: str) -> str:
    return answer.split()[-1].rstrip(".")


def paraphrases(sample: Sample) -> Iterator[str]:
    """Right answers in other words than the set's own."""
    answer, of = sample["messages"][-1]["content"], sample["category"]
    if of == "instruction":
        for form in _INSTRUCTION[skill(sample)]:
            spaced = f"{answer[0]} {answer[1:-1]} {answer[-1]}"
            yield form.format(answer=answer, list=", ".join(answer.split()), spaced=spaced)
    elif of == "persona":
        opening = sample["lenient"][0]["opening"]
        for form in _PERSONA[asked(sample)]:
            yield f"{opening} {form.format(f=fact(answer))}"
    elif of == "passage":
        for form in _PASSAGE["unknown" if answer == "unknown" else skill(sample)]:
            yield form.format(a=answer, n=asked(sample))
    else:
        for write in _CALLS:
            yield write(answer, json.loads(answer))


def _value(sample: Sample) -> str:
    answer = str(sample["messages"][-1]["content"])
    return fact(answer) if sample["category"] == "persona" else answer


def _pool(value: str) -> tuple[str, ...]:
    if value.isdigit():
        return tuple(map(str, range(10, 100)))
    return next((pool for pool in (NAMES, TOWNS, JOBS, WORDS) if value in pool), WORDS)


def _other(value: str, rng: random.Random) -> str:
    return rng.choice([v for v in _pool(value) if v != value])


def _changed_number(text: str) -> str | None:
    digits = [part for part in text.replace("}", " ").replace(",", " ").split() if part.isdigit()]
    return text.replace(digits[0], str(int(digits[0]) + 1), 1) if digits else None


def corruptions(sample: Sample, rng: random.Random, others: list[Sample]) -> Iterator[tuple[str, str]]:
    """Wrong answers with the name of what is wrong, made from the right one."""
    answer, value = str(sample["messages"][-1]["content"]), _value(sample)
    opening = (
        answer[: len(answer) - len(answer.split(maxsplit=1)[-1])] if sample["category"] == "persona" else ""
    )
    same = [o["messages"][-1]["content"] for o in others if o["category"] == sample["category"]]
    yield "another item's answer", rng.choice([a for a in same if fold(a) != fold(answer)])
    if sample["category"] == "function":
        yield from _broken_calls(answer, json.loads(answer), rng)
        return
    yield "a negation", f"{opening}not {value}"
    yield "a negation", answer.replace(value, f"not {value}") if opening else f"It is not {answer}"
    yield "a negation", f"{opening}Anything but {value}."
    guesses = [value, *(_other(value, rng) for _ in range(4))]
    rng.shuffle(guesses)
    yield "extra guesses", opening + " ".join(guesses)
    yield "extra guesses", opening + ", ".join(guesses)
    yield "extra guesses", f"{opening}{value} or {_other(value, rng)}"
    yield "extra guesses", f"{opening}It is {value}. It is {_other(value, rng)}."
    if (changed := _changed_number(answer)) is not None:
        yield "a changed number", changed
        yield "a changed number", f"It is {changed}."
        yield "a changed number", f"{answer}.5"
        yield "a changed number", f"-{answer}"
    if skill(sample) == "repeat":
        yield "a changed number", answer + " " + answer.split()[0]
    if skill(sample) == "avoid":
        forbidden = sample["lenient"][0]["others"][0]
        yield from (
            ("a forbidden extra", f"{value}{joint}{forbidden}") for joint in (",", " ", ", not ", " and ")
        )
    if sample["category"] == "instruction":
        yield "a forbidden extra", value * 3
        yield "a forbidden extra", f"{answer} {_other(value, rng)}"


def _broken_calls(answer: str, call: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, str]]:
    key = rng.choice(list(call["arguments"]))
    right = json.dumps(call["arguments"][key])
    inside = json.dumps(call["arguments"])
    twice = inside.replace("{", f'{{"{key}": 0, ', 1)
    yield "duplicate keys", answer.replace(inside, twice)
    yield "duplicate keys", answer.replace("{", '{"name": "other", ', 1)
    yield (
        "duplicate keys",
        f"```json\n{answer.replace(inside, inside[:-1] + f', {json.dumps(key)}: {right}}}')}\n```",
    )
    yield "a negation", f"Not this: {answer}"
    yield "a negation", f"{answer} is wrong."
    other = {**call, "name": rng.choice(["add", "send", "wait"]) + "_it"}
    yield "extra guesses", f"{answer}\n{json.dumps(other)}"
    yield "extra guesses", f"[{answer}, {json.dumps(other)}]"
    if (changed := _changed_number(answer)) is not None:
        yield "a changed number", changed
        yield "a changed number", f"```json\n{changed}\n```"
    yield "a forbidden extra", json.dumps({**call, "arguments": {**call["arguments"], "extra": 1}})
    yield "a forbidden extra", json.dumps({**call, "note": "done"})


def fold(text: str) -> str:
    return text.casefold()
