"""Strict and lenient scores against wrong and right answers that were made, and judged, apart from the checks.

`tests/support/instruct_answers.jsonl` has what a chat model of 135M parameters (SmolLM2-135M-Instruct) said to 240
prompts of the set, each read by a person: `right` where it answers.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.instruct.checks import passed, share_passed
from nemo_minitron.data.instruct.generate import samples
from nemo_minitron.data.instruct.template_families import TOWNS, WORDS
from tests.support.instruct_answers import corruptions, paraphrases

SAID = Path(__file__).parents[1] / "support" / "instruct_answers.jsonl"
CATEGORY = 50


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return [*samples("test", CATEGORY, 7), *samples("train", CATEGORY, 8)]


def right(sample: dict[str, Any], answer: str) -> tuple[bool, bool]:
    """Strictly, leniently."""
    return share_passed(sample["checks"], answer) == 1, share_passed(sample["lenient"], answer) == 1


def test_of_each_kind_of_wrong_answers_one_in_a_hundred_passes_at_most(asked: list[dict[str, Any]]) -> None:
    rng = random.Random(0)
    made: Counter[str] = Counter()
    strictly: Counter[str] = Counter()
    leniently: Counter[str] = Counter()
    for sample in asked:
        for kind, answer in corruptions(sample, rng, asked):
            strict, lenient = right(sample, answer)
            made[kind] += 1
            strictly[kind] += strict
            leniently[kind] += lenient
    assert len(made) == 6
    assert min(made.values()) >= 200, made
    assert not any(strictly.values()), strictly
    for kind, count in made.items():
        assert leniently[kind] <= count / 100, (kind, leniently[kind], count)


def test_no_right_paraphrase_fails_the_lenient_score(asked: list[dict[str, Any]]) -> None:
    """Per category at least 200; few of them have the short form that the strict score wants."""
    said: Counter[str] = Counter()
    strictly = 0
    for sample in asked:
        for answer in paraphrases(sample):
            strict, lenient = right(sample, answer)
            assert lenient, (sample["family"], sample["messages"][-1]["content"], answer)
            said[sample["category"]] += 1
            strictly += strict
    assert min(said.values()) >= 200, said
    assert strictly < said.total() / 2


def test_what_a_real_model_said_is_judged_as_by_a_person() -> None:
    rows = [json.loads(line) for line in SAID.read_text().splitlines()]
    found = samples("test", 60, 1234)
    assert [row["reference"] for row in rows] == [sample["messages"][-1]["content"] for sample in found]
    judged = [(row["right"], *right(sample, row["said"])) for row, sample in zip(rows, found, strict=True)]
    wrong = [lenient for true, _, lenient in judged if not true]
    assert len(wrong) >= 200
    assert sum(wrong) <= len(wrong) / 100
    assert all(lenient for true, _, lenient in judged if true)
    assert not any(strict for true, strict, _ in judged if not true)


NUMBER = {"kind": "says", "text": "45", "others": ["12", "33", "unknown", "Bob"]}
TOWN = {"kind": "says", "text": "Paris", "others": ["Bob", *(town for town in TOWNS if town != "Paris")]}
THING = {"kind": "says", "text": "file", "others": ["key", "line", "Bob"], "pool": list(WORDS)}
UNKNOWN = {"kind": "says_unknown", "others": ["12", "33", "Bob"], "pool": [*WORDS, *TOWNS]}
JOB = {"kind": "says", "opening": "Hey!", "text": "baker", "others": ["writer", "pilot"]}
MARKED = {"kind": "writes", "text": "file!"}
UPPER = {"kind": "writes", "text": "FILE", "case": True}
THRICE = {"kind": "writes_often", "text": "file", "count": 3}
CALL = {"kind": "gives_call", "name": "f", "arguments": {"n": 3, "s": "x"}}
F = '{"name": "f", "arguments": {"n": 3, "s": "x"}}'
# Written without a look at the rules: a check, right answers, wrong ones.
READ: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        NUMBER,
        [
            "Forty-five.",
            "Her code? 45!",
            "45 is the code of Ann.",
            "Ann's number is no. 45.",
            "No problem, it's 45.",
        ],
        [
            "450",
            "4 5",
            "45%",
            "about 46",
            "nearly 45",
            "more than 45",
            "forty-six",
            "45.0.1",
            "I doubt it is 45",
        ],
    ),
    (
        TOWN,
        [
            "Paris, France.",
            "PARIS",
            "Ann has her home in Paris, of course.",
            "Currently Paris",
            "Paris it is.",
        ],
        ["Paris, Madrid", "Paris Madrid Vienna", "She left Paris", "near Paris", "Paris? Never!", "Parisian"],
    ),
    (
        THING,
        ["She got a file.", "It was the file that Ann got.", "the answer is file", "Just the file."],
        ["files", "file and lamp", "profile", "file, lamp, chair", "anything except file", "No file"],
    ),
    (
        UNKNOWN,
        [
            "I do not know.",
            "There's no answer in the text.",
            "Nothing is said about Ann.",
            "No information given.",
        ],
        ["It is not unknown", "known", "The text does not say, maybe 12", "Bob", "Paris"],
    ),
    (
        JOB,
        ["Hey! I'm a baker by trade.", "hey! baker.", "Hey! I am Ann, a baker from Rome."],
        [
            "Hey! I am no baker",
            "Hey! baker or cook",
            "I am a baker",
            "Hey! I used to be a baker",
            "Yo! baker",
        ],
    ),
    (
        MARKED,
        ["file !", "Here you go: file!", "**file!**", "Sure, file!"],
        ["file", "!file", "file!!", "filefile!", "not file!", "file.", "file!?"],
    ),
    (UPPER, ["FILE", "FILE!", "Upper case: FILE", "It's FILE."], ["file", "File", "FILE FILE", "FILES"]),
    (
        THRICE,
        ["File, file, file.", "file\nfile\nfile", "1. file\n2. file\n3. file"],
        ["file file", "file file file file", "file 3", "file file key"],
    ),
    (
        CALL,
        [
            f"```\n{F}\n```",
            f"I will call f: {F}",
            F.replace("3", "3.0"),
            f"[{F}]",
            f"<tool_call>{F}</tool_call>",
        ],
        [
            F.replace("3", '"3"'),
            F.replace("3", "true"),
            F.replace('"f"', '"g"'),
            f"{F} {F}",
            "f(3)",
            F[:-1],
            "{" * 9999,
        ],
    ),
]


@pytest.mark.parametrize("number", range(len(READ)))
def test_a_lenient_check_reads_as_a_person_would(number: int) -> None:
    check, good, bad = READ[number]
    assert [answer for answer in good if not passed(check, answer)] == []
    assert [answer for answer in bad if passed(check, answer)] == []
