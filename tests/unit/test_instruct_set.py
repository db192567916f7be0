"""The project's own instruct set: checks decided by hand, splits by family, pairs, and the same bytes each time."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.instruct import InstructSizes
from nemo_minitron.data.chat.conversations import read_conversations, read_preferences
from nemo_minitron.data.chat.encoding import encode_conversation
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.instruct import (
    CATEGORIES,
    InstructFiles,
    cached_instruct_set,
    generate,
    lenient,
    write_instruct_set,
)
from nemo_minitron.data.instruct.checks import KINDS, passed, share_passed
from nemo_minitron.data.instruct.generate import SKILLS, families, samples
from nemo_minitron.data.instruct.schema import violation
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
SIZES = InstructSizes(train=60, seen=10, valid=10, test=40, preference_train=60, preference_valid=10)
OBJECT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "m": {"enum": ["on", "off"]}},
    "required": ["n"],
}
CALL = '{"name": "f", "arguments": {"n": 3}}'

# A check, answers that pass it, answers that do not.
DECIDED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"kind": "starts_with", "text": "Hey!"}, ["Hey! I am Ann.", "  hey!"], ["Hey x", "I say Hey!", ""]),
    ({"kind": "ends_with", "text": "!"}, ["file!", "file!\n"], ["file", "!file", ""]),
    ({"kind": "contains", "text": "17"}, ["17", "It is 17.", "a 17, b"], ["170", "117", "1 7", "x17"]),
    ({"kind": "contains", "text": "file"}, ["(file)", "File!"], ["files", "profile", "file_name"]),
    (
        {"kind": "is", "texts": ["file!", "I am Ann."]},
        ["file!", " File!\n", "i am  Ann.", "file!."],
        ["file", "not file!", "file! file!", "filefile!", "I am Anna.", "I am Ann, Bob.", ""],
    ),
    ({"kind": "equals", "text": "a-b"}, ["a-b", " a-b\n"], ["a-b.", "b-a", "a - b"]),
    ({"kind": "lacks", "texts": ["x", "17"]}, ["y", "", "170"], ["x", "y 17", "y, x."]),
    (
        {"kind": "repeats", "text": "a", "count": 3},
        ["a a a", "a  A\na"],
        ["a a", "a a a a", "a a b", "a, a, a"],
    ),
    ({"kind": "words", "most": 2}, ["a", "a b"], ["a b c", ""]),
    ({"kind": "upper"}, ["FILE", "A1!"], ["File", "1", ""]),
    (
        {"kind": "call_json"},
        [CALL],
        [
            *(CALL[:-1], "[]", "f(3)", '{"name": "f"}', CALL + CALL, '{"name": 1, "arguments": {}}'),
            CALL.replace('"n": 3', '"n": 4, "n": 3'),
            CALL.replace("{", '{"name": "g", ', 1),
        ],
    ),
    ({"kind": "call_name", "name": "f"}, [CALL], [CALL.replace('"f"', '"g"'), "f"]),
    (
        {"kind": "call_schema", "schema": OBJECT},
        [CALL],
        [CALL.replace("3", "10"), CALL.replace("3", "true"), "3"],
    ),
    (
        {"kind": "call_arguments", "arguments": {"n": 3}},
        [CALL],
        [CALL.replace("3", "4"), CALL.replace("3", '"3"')],
    ),
    (
        {"kind": "call_arguments", "arguments": {"n": 1}},
        [CALL.replace("3", "1")],
        [CALL.replace("3", "true")],
    ),
]


@pytest.mark.parametrize("number", range(len(DECIDED)))
def test_a_check_decides_as_a_person_would(number: int) -> None:
    check, right, wrong = DECIDED[number]
    assert [answer for answer in right if not passed(check, answer)] == []
    assert [answer for answer in wrong if passed(check, answer)] == []


def test_every_kind_of_check_is_decided_above() -> None:
    used = {check["kind"] for row in samples("train", 60, 1) for check in row["checks"]}
    assert used <= {check["kind"] for check, _, _ in DECIDED} == set(KINDS) - set(lenient.KINDS)


def test_the_share_of_checks() -> None:
    checks = [{"kind": "starts_with", "text": "a"}, {"kind": "ends_with", "text": "b"}]
    assert [share_passed(checks, answer) for answer in ("a b", "a", "c")] == [1.0, 0.5, 0.0]
    for bad in ([], [{"kind": "nice"}], [{"kind": "contains"}], [{"kind": "repeats", "text": "a"}]):
        with pytest.raises(InputError, match="f, line 3"):
            share_passed(bad, "a", "f, line 3")


SCHEMA_CASES: list[tuple[Any, dict[str, Any], str | None]] = [
    ({"n": 1, "m": "on"}, OBJECT, None),
    ({"n": 2.0}, OBJECT, None),
    ({"m": "on"}, OBJECT, "$: lacks n"),
    ({"n": 0}, OBJECT, "$.n: is below 1"),
    ({"n": 10}, OBJECT, "$.n: is above 9"),
    ({"n": 1.5}, OBJECT, "$.n: is no integer"),
    ({"n": True}, OBJECT, "$.n: is no integer"),
    ({"n": 1, "m": "auto"}, OBJECT, "$.m: is none of ['on', 'off']"),
    ({"n": 1, "x": 1}, OBJECT, None),
    ({"n": 1, "x": 1}, {**OBJECT, "additionalProperties": False}, "$: has x, which the schema does not know"),
    ([1, "a"], {"type": "array", "items": {"type": "number"}}, "$[1]: is no number"),
    (None, {"type": "null"}, None),
    (1, {"enum": [True]}, "$: is none of [True]"),
]


@pytest.mark.parametrize("number", range(len(SCHEMA_CASES)))
def test_json_schema(number: int) -> None:
    value, schema, expected = SCHEMA_CASES[number]
    assert violation(value, schema) == expected


def test_a_schema_that_is_not_understood_is_refused() -> None:
    with pytest.raises(InputError, match="schema at .: keyword 'pattern' is not checked here"):
        violation("a", {"type": "string", "pattern": "b"})
    with pytest.raises(InputError, match="unknown type 'text'"):
        violation({"a": 1}, {"properties": {"a": {"type": "text"}}})


# ---- the set -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> InstructFiles:
    return write_instruct_set(tmp_path_factory.mktemp("set"), 5, SIZES)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sizes_categories_and_references(files: InstructFiles) -> None:
    for split in ("train", "seen", "valid", "test"):
        found = read_conversations(getattr(files, split))
        categories = [c.extra["category"] for c in found]
        assert {c: categories.count(c) for c in CATEGORIES} == dict.fromkeys(
            CATEGORIES, getattr(SIZES, split)
        )
        for c in found:
            assert share_passed(c.extra["checks"], c.messages[-1]["content"]) == 1
            assert share_passed(c.extra["lenient"], c.messages[-1]["content"]) == 1


def test_splits_share_no_family_and_no_wording(files: InstructFiles) -> None:
    used = {s: {row["family"] for row in rows(getattr(files, s))} for s in ("train", "valid", "test", "seen")}
    for a, b in itertools.combinations(("train", "valid", "test"), 2):
        assert not used[a] & used[b]
    assert used["seen"] <= {f.name for f in families("train")}
    for skill in SKILLS:
        wordings = [str(w) for split in ("train", "valid", "test") for w in skill.wordings[split]]
        assert len(wordings) == len(set(wordings)), skill.name


def test_no_prompt_that_is_scored_was_trained_on(files: InstructFiles) -> None:
    def prompts(name: str) -> set[str]:
        return {
            json.dumps(row["messages"] if "chosen" in row else row["messages"][:-1])
            for row in rows(getattr(files, name))
        }

    trained = prompts("train") | prompts("preference_train")
    for name in ("seen", "test", "valid"):
        assert not prompts(name) & trained
        assert len(prompts(name)) == len(rows(getattr(files, name)))


def test_a_rejected_answer_breaks_a_check_and_earns_less(files: InstructFiles) -> None:
    broken = 0
    for pair in read_preferences(files.preference_train):
        checks = pair.extra["checks"]
        assert pair.chosen_reward == 1.0 == share_passed(checks, pair.chosen)
        failed = [check for check in checks if not passed(check, pair.rejected)]
        assert failed
        assert pair.rejected_reward == pytest.approx(1 - len(failed) / len(checks))
        broken += 1
    assert broken >= 200


def test_every_wrong_answer_of_every_family_is_wrong() -> None:
    import random

    for family in [*families("train"), *families("valid"), *families("test")]:
        for seed in range(30):
            draft = family.draft(random.Random(seed))
            assert share_passed(draft.checks, draft.answer) == 1, family.name
            for wrong in draft.wrong:
                assert share_passed(draft.checks, wrong) < 1, (family.name, wrong)


def test_answers_follow_from_the_prompt(files: InstructFiles) -> None:
    """Read independently of the generator: the passage has the answer, the system line the persona's marker."""
    for row in rows(files.test):
        *prompt, answer = row["messages"]
        said, text = answer["content"], "\n".join(m["content"] for m in prompt)
        if row["category"] == "passage":
            assert said == "unknown" or re.search(rf"\b{said}\b", text)
        elif row["category"] == "persona":
            marker, fact = said.split()[0], said.split()[-1].rstrip(".")
            assert marker in prompt[0]["content"]
            assert fact in prompt[0]["content"]
        elif row["category"] == "function":
            call = json.loads(said)
            tools = [json.loads(line) for line in prompt[0]["content"].splitlines()[1:]]
            (tool,) = [t for t in tools if t["name"] == call["name"]]
            assert set(call["arguments"]) == set(tool["parameters"]["required"])
            for value in call["arguments"].values():
                assert str(value) in prompt[1]["content"]


def test_samples_fit_the_demo_model(files: InstructFiles) -> None:
    tokenizer = with_template(load_tokenizer(DEMO), "demo")
    lengths = {
        c: [
            len(encode_conversation(tokenizer, s.messages, s.where)[0].tokens)
            for s in found
            if s.extra["category"] == c
        ]
        for found in [read_conversations(files.test)]
        for c in CATEGORIES
    }
    assert max(max(found) for found in lengths.values()) <= 300


def test_seed_and_sizes_decide_the_bytes(tmp_path: Path) -> None:
    small = InstructSizes(train=8, seen=2, valid=2, test=2, preference_train=2, preference_valid=2)
    a, b, c = (
        write_instruct_set(tmp_path / name, seed, small) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for name in vars(a):
        assert getattr(a, name).read_bytes() == getattr(b, name).read_bytes()
        assert getattr(a, name).read_bytes() != getattr(c, name).read_bytes()
    cached = cached_instruct_set(tmp_path / "cache", 1, small)
    assert cached.train.read_bytes() == a.train.read_bytes()
    stamp = cached.train.stat().st_mtime_ns
    again = cached_instruct_set(tmp_path / "cache", 1, small)
    assert (again, again.train.stat().st_mtime_ns) == (cached, stamp)


def test_more_samples_than_there_are_prompts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [
        next(s for s in SKILLS if s.category == c and s.name in ("upper", "one_turn", "code", "add"))
        for c in CATEGORIES
    ]
    monkeypatch.setattr(generate, "SKILLS", few)
    # One wording for 30 words.
    assert len(samples("valid", 20, 1)) == 80
    with pytest.raises(InputError, match="valid families of instruction"):
        samples("valid", 31, 1)
    with pytest.raises(InputError, match="sizes.test=0: must be at least 1"):
        write_instruct_set(tmp_path, 1, InstructSizes(test=0))
    with pytest.raises(InputError, match="split=dev"):
        families("dev")
