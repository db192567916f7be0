"""Instruct evaluation: greedy answers against a loop by hand, scores by hand, refusals by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from nemo_minitron.config.instruct import InstructEvalConfig
from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.evaluation.instruct import Answer, Item, answers, load_items, rows, scores
from nemo_minitron.workflows.evaluate_instruct.check import gguf_of
from nemo_minitron.workflows.evaluate_instruct.on_device import GGUF_ANSWERS, compared
from tests.support import gguf_files

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


def test_llama_cpp_says_what_transformers_says(tmp_path: Path) -> None:
    """Greedy tokens of a random model, a whole pass for each here; an answer that differs fails, and is named."""
    bpe = gguf_files.byte_level(gguf_files.TEXT, 340, PRE_TOKENIZERS[0].rules())
    model = gguf_files.make_model("llama", bpe.get_vocab_size())
    file = gguf_files.write_gguf(
        tmp_path / "toy.gguf", model, Kind.F32, gguf_files.gpt2_vocabulary(bpe, "gpt-2")
    )
    items, said, stop = [], [], bpe.token_to_id("<|end|>")
    for number, question in enumerate(("The lazy fox", "jumps over", "12345 dogs", "a")):
        tokens = bpe.encode(question).ids
        items.append(Item(f"q.jsonl:{number}", "x", "", [], tokens, "", [], []))
        new = by_hand(model, tokens, stop, 12)
        said.append(bpe.decode([token for token in new if token != stop], skip_special_tokens=False))
    assert len(set(said)) > 1
    found = compared(file, items, said, 12, tmp_path)
    assert (found["gguf_answers"], found["gguf_answers_equal"]) == (4, 4)
    with pytest.raises(
        FailedRun, match=r"1 of 4 prompts otherwise than transformers, the first at q.jsonl:1: "
    ):
        compared(file, items, [said[0], said[1] + "!", *said[2:]], 12, tmp_path)
    kept = [json.loads(line) for line in (tmp_path / GGUF_ANSWERS).read_text().splitlines()]
    assert [row["equal"] for row in kept] == [True, False, True, True]


def test_one_gguf_file_is_compared(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert gguf_of(InstructEvalConfig(gguf=str(tmp_path / "a.gguf"))) == tmp_path / "a.gguf"
    assert gguf_of(InstructEvalConfig()) is None
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "c.gguf"):
        with pytest.raises(
            InputError, match=f"instruct.gguf={wrong}: must be a GGUF file, or a directory with one"
        ):
            gguf_of(InstructEvalConfig(gguf=str(wrong)))
    (tmp_path / "b.gguf").unlink()
    assert gguf_of(InstructEvalConfig(gguf=str(tmp_path))) == tmp_path / "a.gguf"
