"""recipes/instruct_data.py and recipes/evaluate_instruct.py as a user types them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.data.chat.encoding import encode_conversation
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.tokenizer import load_tokenizer
from tests.functional.conftest import Teacher
from tests.support.commands import ROOT, Commands, tree

DEMO = ROOT / "assets" / "demo-teacher"
SIZES = [f"{name}=2" for name in ("train", "seen", "valid", "test", "preference_train", "preference_valid")]
GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]}
LONG = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes " * 99}]}
FIRST = {"conversations": [{"from": "gpt", "value": "yes"}]}
PAIR = {"messages": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no", "id": 1}
QUESTION = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
    "category": "greeting",
    "checks": [{"kind": "contains", "text": "yes"}],
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_data_is_made_converted_and_refused(commands: Commands) -> None:
    """All in one process: imports take longer than the work."""
    home = commands.home / "instruct"
    good = write_jsonl(home / "good.jsonl", [GOOD, LONG, GOOD])
    bad = write_jsonl(home / "bad.jsonl", [GOOD, FIRST])
    unscored = write_jsonl(home / "unscored.jsonl", [QUESTION, GOOD | {"messages": QUESTION["messages"]}])
    pairs = write_jsonl(home / "pairs.jsonl", [PAIR, PAIR | {"chosen": "no", "rejected": "yes"}])
    data, ask = "instruct_data", "evaluate_instruct"
    of_pairs = [f"{data}.input={pairs}", f"{data}.kind=preferences"]
    limit = [f"{data}.tokenizer={DEMO}", f"{data}.max_tokens=64"]
    cases: dict[str, tuple[str, list[str], list[str]]] = {
        "made": (data, [f"{data}.sizes.{size}" for size in SIZES], []),
        "converted": (data, [f"{data}.input={good}", *limit, f"{data}.overlong=drop"], []),
        "pairs": (data, [*of_pairs, *limit], []),
        "cut pairs": (data, [*of_pairs, *limit, f"{data}.overlong=cut"], ["overlong=cut", "drop or refuse"]),
        "no pairs": (
            data,
            [f"{data}.input={good}", f"{data}.kind=preferences"],
            [f"{good}, line 1", "messages"],
        ),
        "starts": (data, [f"{data}.input={bad}"], [f"{bad}, line 2, message 1", "assistant at the start"]),
        "long": (data, [f"{data}.input={good}", *limit], [f"{good}, line 2", "the context has 64"]),
        "absent": (data, [f"{data}.input={home}/no.jsonl"], [f"{home}/no.jsonl", "cannot be read"]),
        "no tokenizer": (
            data,
            [f"{data}.input={good}", f"{data}.max_tokens=64"],
            ["instruct_data.tokenizer"],
        ),
        "format": (data, [f"{data}.input={good}", f"{data}.format=csv"], ["format=csv", "alpaca"]),
        "kind": (data, [f"{data}.kind=images"], ["instruct_data.kind=images", "preferences"]),
        "sizes": (data, [f"{data}.sizes.test=0"], ["sizes.test=0"]),
        "unscored": (ask, [f"instruct.file={unscored}"], [f"{unscored}, line 2", "category"]),
        "split": (ask, ["instruct.split=train"], ["instruct.split=train", "test, seen, valid"]),
        "room": (ask, ["instruct.max_new_tokens=400"], ["test.jsonl, line", "max_new_tokens=400"]),
        "batch": (ask, ["instruct.batch_size=0"], ["instruct.batch_size=0", "at least 1"]),
        "no source": (ask, [f"source={home}"], [f"source={home}", "no checkpoint"]),
    }
    asked = [
        {"recipe": recipe, "overrides": [*overrides, f"run_dir={home / name}"], "env": {}}
        for name, (recipe, overrides, _) in cases.items()
    ]
    for (name, (_, _, parts)), got in zip(cases.items(), commands.ask(asked), strict=True):
        assert got["code"] == (2 if parts else 0), (name, got)
        assert not got["nemo"], name
        if parts:
            assert len(got["err"].splitlines()) == 1, got["err"]
            assert not tree(home / name), name
        for part in parts:
            assert part in got["err"], name
    made = json.loads((home / "made" / "result.json").read_text())
    assert made["train_samples"] == made["test_samples"] == made["preference_valid_samples"] == 8
    assert len(lines(home / "made" / "test.jsonl")) == 8
    assert lines(home / "pairs" / "train.jsonl")[0] == PAIR
    result = json.loads((home / "converted" / "result.json").read_text())
    assert (result["train_samples"], result["samples_of_input"], result["dropped_of_input"]) == (2, 3, 1)
    assert (
        lines(home / "converted" / "train.jsonl")
        == [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]}] * 2
    )


SPECIAL = {
    "system_turn_start": "<|endoftext|>",
    "turn_start": "<|endoftext|>",
    "end_of_name": "\n",
    "end_of_turn": "",
    "label_start": "<|pad|>",
}
CHATS = [
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "yes")],
    [
        ("system", ""),
        ("user", "Add 1."),
        ("assistant", "  f(1)"),
        ("user", "Thanks"),
        ("assistant", "Bye\n\nnow"),
    ],
    [("system", "S"), ("user", "Q"), ("assistant", "{}"), ("tool", "3"), ("assistant", "It is 3.")],
]


@pytest.mark.slow
def test_the_default_template_is_nemo_s_chat_format(commands: Commands) -> None:
    """Ids and learned positions are those of NeMo's own chat dataset."""
    asked = []
    for chat in CHATS:
        names = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
        turns = [{"from": names[role], "value": text} for role, text in chat[1:]]
        mask = "User,Tool" if any(role == "tool" for role, _ in chat) else "User"
        asked.append([str(DEMO), SPECIAL, {"system": chat[0][1], "mask": mask, "conversations": turns}])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "nemo_chat_format.py")],
        input=json.dumps(asked),
        env=commands.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = with_template(load_tokenizer(DEMO), "demo")
    for chat, theirs in zip(CHATS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        messages = [{"role": role, "content": text} for role, text in chat]
        (ours,) = encode_conversation(tokenizer, messages, "here")
        assert theirs["input_ids"] == ours.tokens
        assert theirs["mask"] == ours.loss_mask


def evaluation(commands: Commands, source: Path, run_dir: Path) -> tuple[dict[str, Any], list[Any]]:
    file = write_jsonl(commands.home / "questions.jsonl", [QUESTION, {**QUESTION, "category": "other"}])
    ended = commands.run(
        "evaluate_instruct",
        f"source={source}",
        f"instruct.file={file}",
        "instruct.max_new_tokens=8",
        f"run_dir={run_dir}",
    )
    return ended.result(), lines(run_dir / "answers.jsonl")


def test_a_model_is_scored(commands: Commands, teacher: Teacher) -> None:
    """The tiny teacher knows nothing; what is looked at is that its answers are counted as what they are."""
    result, said = evaluation(commands, teacher.huggingface, commands.home / "scored")
    assert [row["category"] for row in said] == ["greeting", "other"]
    expected = sum("yes" in row["answer"].split() for row in said) / 2
    assert result["overall_score"] == expected
    assert (result["greeting_samples"], result["other_samples"], result["samples"]) == (1, 1, 2)
    assert result["unfinished"] == sum(not row["finished"] for row in said)


@pytest.mark.slow
def test_a_nemo_checkpoint_answers_as_its_export(commands: Commands, teacher: Teacher) -> None:
    _, exported = evaluation(commands, teacher.huggingface, commands.home / "scored-hf")
    _, native = evaluation(commands, teacher.run_dir, commands.home / "scored-nemo")
    assert native == exported
    assert not list((commands.home / "scored-nemo").glob(".huggingface-*"))
