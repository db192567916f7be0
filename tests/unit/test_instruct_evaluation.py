"""Instruct evaluation: greedy answers against a loop by hand, scores by hand, refusals by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.instruct import Answer, Item, answers, load_items, rows, scores

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"


def sample(question: str, answer: str, category: str = "passage") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "category": category,
        "family": f"{category}/x",
        "checks": [{"kind": "contains", "text": answer}, {"kind": "words", "most": 2}],
    }


SAMPLES = [
    sample("What is the code of Ann in this text?", "17"),
    sample("Hi", "yes", "persona"),
    sample("Go", "no"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_template(AutoTokenizer.from_pretrained(str(DEMO)), "demo")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config)
    # What a checkpoint's own settings say must not count.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3
    return model


def by_hand(model: Any, prompt: list[int], stop: int, most: int) -> list[int]:
    """One whole forward pass a token: no cache, no padding, no `generate`."""
    tokens: list[int] = []
    while len(tokens) < most and stop not in tokens:
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


def test_answers_are_greedy_whatever_the_batch(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    items = load_items(write_jsonl(tmp_path / "f.jsonl", SAMPLES), tokenizer, context=512, max_new_tokens=12)
    model.train()
    seen: list[int] = []
    together = answers(model, tokenizer, items, max_new_tokens=12, batch_size=2, progress=seen.append)
    assert seen == [2, 3]
    assert not model.training
    assert answers(model, tokenizer, items, max_new_tokens=12, batch_size=1) == together
    for item, answer in zip(items, together, strict=True):
        with torch.no_grad():
            expected = by_hand(model, item.tokens, 0, 12)
        assert answer.text == tokenizer.decode([t for t in expected if t != 0])
        assert answer.finished == (0 in expected)


def test_an_answer_ends_at_the_end_marker(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    """With an output layer that always prefers it, and with one that never does."""
    items = load_items(write_jsonl(tmp_path / "f.jsonl", SAMPLES), tokenizer, context=512, max_new_tokens=4)
    rigged = LlamaForCausalLM(model.config)
    for sign, finished in ((1.0, True), (0.0, False)):
        with torch.no_grad():
            rigged.lm_head.weight.zero_()
            # Only one row differs from zero; the final norm's output is made a constant.
            rigged.model.norm.weight.zero_()
            rigged.lm_head.bias = torch.nn.Parameter(torch.arange(1024.0) * (1 - sign))
            rigged.lm_head.bias[0] += 5000.0 * sign
        said = answers(rigged, tokenizer, items, max_new_tokens=4, batch_size=3)
        assert {a.finished for a in said} == {finished}
        assert all((a.text == "") == finished for a in said)


def item(category: str) -> Item:
    return Item(
        "f, line 1", category, "x", [], [1], "r", [{"kind": "upper"}], [{"kind": "contains", "text": "r"}]
    )


def test_scores_by_hand() -> None:
    items = [item("a"), item("a"), item("b"), item("a")]
    said = [
        Answer("R", True, 1.0, True),
        Answer("r", True, 0.5, True),
        Answer("R", False, 1.0, True),
        Answer("", True, 0.0, False),
    ]
    found = scores(items, said)
    assert found == {
        "a_score": pytest.approx(1 / 3),
        "a_score_lenient": pytest.approx(2 / 3),
        "a_checks": 0.5,
        "a_samples": 3,
        "b_score": 1.0,
        "b_score_lenient": 1.0,
        "b_checks": 1.0,
        "b_samples": 1,
        "overall_score": 0.5,
        "overall_score_lenient": 0.75,
        "overall_checks": 0.625,
        "samples": 4,
        "unfinished": 1,
    }
    assert [row["answer"] for row in rows(items, said)] == ["R", "r", "R", ""]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SAMPLES[0].items() if key != name}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no category": (without("category"), "category=None"),
    "a category that is no name": ({**SAMPLES[0], "category": "a b"}, "category='a b'"),
    "no checks": (without("checks"), "checks: must be a list of objects"),
    "an empty list of checks": ({**SAMPLES[0], "checks": []}, "no checks"),
    "lenient checks that are none": ({**SAMPLES[0], "lenient": 3}, "lenient: must be a list of objects"),
    "an unknown check": ({**SAMPLES[0], "checks": [{"kind": "polite"}]}, "unknown kind of check 'polite'"),
    "a wrong reference": (
        {**SAMPLES[0], "checks": [{"kind": "upper"}, {"kind": "words", "most": 1}]},
        "its own answer passes only 50%",
    ),
    "a prompt that is too long": (sample("Go " * 100, "yes"), "more than the model's context of 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_prompt_that_cannot_be_scored_is_refused(case: str, tokenizer: Any, tmp_path: Path) -> None:
    row, part = BAD[case]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (SAMPLES[1], row)))
    with pytest.raises(InputError) as caught:
        load_items(path, tokenizer, context=64, max_new_tokens=8)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert part in str(caught.value)
