"""Task files: what is refused by file and line, how questions become tokens, what accuracy means."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.multiple_choice import Task, accuracy_and_margin, load_task

GOOD = {"question": "2 + 2 =", "choices": ["4", "five"], "answer": 0}


class Letters:
    """A tokenizer with a token for each character, and one for "=" with a space after it."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text.replace("= ", "≡")]


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_questions_become_tokens(tmp_path):
    by_text = {"question": "Say a", "choices": ["b", " cd "], "answer": " cd "}
    task = load_task(write(tmp_path / "t.jsonl", GOOD, "", by_text), Letters(), 100)
    assert (task.choices, task.answers) == ([2, 2], [0, 1])
    texts = ["".join(map(chr, request.tokens[1:])) for request in task.requests]
    assert texts == ["2 + 2 ≡4", "2 + 2 ≡five", "Say a b", "Say a cd"]
    assert {request.tokens[0] for request in task.requests} == {0}
    begun = load_task(tmp_path / "t.jsonl", Letters(), 100, beginning=[5])
    assert [r.tokens for r in begun.requests] == [[5, *r.tokens[1:]] for r in task.requests]
    # The token that joins the question's end with the space is scored, for all choices alike.
    assert [request.scored for request in task.requests] == [2, 5, 2, 3]


def test_the_context_is_a_limit_on_what_is_read(tmp_path):
    path = write(tmp_path / "t.jsonl", GOOD)  # the longer one: 1 + 11 tokens, of which 11 are read
    load_task(path, Letters(), 11)
    with pytest.raises(
        InputError, match="line 1: choice 1 makes 11 tokens with its question.* context has 10"
    ):
        load_task(path, Letters(), 10)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected a JSON object"),
        ({"question": "q", "choices": ["a", "b"]}, "key 'answer' is missing"),
        ({"choices": ["a", "b"], "answer": 0}, "key 'question' is missing"),
        ({**GOOD, "question": " "}, "question: must be a string"),
        ({**GOOD, "question": 3}, "question: must be a string"),
        ({**GOOD, "choices": ["4"]}, "choices: must be a list of at least 2"),
        ({**GOOD, "choices": "ab"}, "choices: must be a list of at least 2"),
        ({**GOOD, "choices": ["4", 5]}, "choices: 5 is no string"),
        ({**GOOD, "choices": ["4", ""]}, "choices: '' is no string, or blank"),
        ({**GOOD, "choices": ["4", "4"]}, "choices: '4' is there twice"),
        ({**GOOD, "answer": 2}, "answer: 2 is neither an index from 0 to 1"),
        ({**GOOD, "answer": -1}, "answer: -1 is neither"),
        ({**GOOD, "answer": True}, "answer: True is neither"),
        ({**GOOD, "answer": "six"}, "answer: 'six' is neither"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, says):
    path = write(tmp_path / "task.jsonl", GOOD, GOOD, line)
    with pytest.raises(InputError) as refusal:
        load_task(path, Letters(), 100)
    assert str(refusal.value).startswith(f"{path}, line 3: ")
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no question"),
        (b"\n \n", "holds no question"),
        (b'{"question": "\xff"}', "line 1: not UTF-8"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, content, says):
    (tmp_path / "task.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"task.jsonl[:,] {says}"):
        load_task(tmp_path / "task.jsonl", Letters(), 100)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no.jsonl: cannot be read"):
        load_task(tmp_path / "no.jsonl", Letters(), 100)


def test_accuracy_and_margin_by_hand():
    task = Task("", [], [2, 3], [0, 2])
    losses = torch.tensor([[1.0, 2.0, 5.0, 4.0, 3.5], [2.0, 2.0, 1.0, 3.0, 2.0]]).double()
    accuracy, margin = accuracy_and_margin(losses, task)
    assert accuracy.tolist() == [1.0, 0.0]  # the second pass ties, then prefers a wrong one
    assert margin.tolist() == [(1 + 0.5) / 2, (0 - 1) / 2]
