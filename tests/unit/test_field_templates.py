"""The chat templates of the field, held to transformers: its rendering, its tokens and its own masks of answers.

Each form is written here anew, in what it does and not in its text. Between its generation marks stands what a model of
it writes; without the marks, the package has to find that by itself.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemo_minitron.alignment.comparisons import encode_pairs
from nemo_minitron.data.chat.conversations import Conversation, Preference, merged
from nemo_minitron.data.chat.encoded import encode_split
from nemo_minitron.data.chat.encoding import encode_conversation, render_prompt, stop_token, stop_tokens
from nemo_minitron.data.chat.fitting import fit_conversations, fit_preferences
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.errors import InputError
from tests.support.field_templates import (
    END,
    ENDS,
    FORMS,
    MARK,
    NO_SYSTEM,
    REWRITES,
    SENTENCEPIECE,
    SYSTEM,
    TURNS,
    demo,
    sentencepiece,
)

CASES = [(demo, name) for name in FORMS] + [(sentencepiece, name) for name in SENTENCEPIECE]
IDS = [f"{make.__name__} {name}" for make, name in CASES]


def theirs(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def last_run(mask: list[int]) -> list[int]:
    """The last answer alone."""
    end = max(i for i, m in enumerate(mask) if m) + 1
    begin = next((i + 1 for i in range(end - 1, -1, -1) if not mask[i]), 0)
    return [0] * begin + [1] * (end - begin) + [0] * (len(mask) - end)


@pytest.mark.parametrize(("make", "name"), CASES, ids=IDS)
def test_one_answer_has_transformers_tokens_and_mask(make: Any, name: str) -> None:
    """With the marks taken away the package finds the same tokens as transformers with them."""
    ours = with_template(make(name), "here")
    for messages in (TURNS[:2], [SYSTEM, *TURNS[:2]]):
        if name in NO_SYSTEM and messages[0] is SYSTEM:
            with pytest.raises(InputError, match="f, line 1: the chat template cannot render it"):
                encode_conversation(ours, messages, "f, line 1")
            continue
        for tokenizer in (ours, make(name, marked=True)):
            (encoded,) = encode_conversation(tokenizer, messages, "here")
            assert (encoded.tokens, encoded.loss_mask) == theirs(make(name, marked=True), messages)
            assert encoded.tokens == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(("make", "name"), CASES, ids=IDS)
def test_several_answers_are_learned_as_the_template_shows_them(make: Any, name: str) -> None:
    """In one sample where earlier turns stay as they are; else a sample for each answer, which ends with it."""
    ours, marked = with_template(make(name), "here"), make(name, marked=True)
    messages = TURNS if name in NO_SYSTEM else [SYSTEM, *TURNS]
    found = encode_conversation(ours, messages, "here")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if name in REWRITES:
        expected = [theirs(marked, messages[: i + 1]) for i in answers]
        expected = [(tokens, last_run(mask)) for tokens, mask in expected]
    else:
        expected = [theirs(marked, messages)]
    assert [(each.tokens, each.loss_mask) for each in found] == expected
    # What is learned is what decoding would have to write after the prompt.
    for each, index in zip(found, answers[-len(found) :], strict=True):
        prompt = render_prompt(ours, messages[:index], "here")
        assert each.tokens[: len(prompt)] == prompt
        assert each.loss_mask[len(prompt)] == 1


@pytest.mark.parametrize("name", FORMS)
def test_the_tokens_that_end_an_answer(name: str) -> None:
    tokenizer = demo(name)
    assert tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, "here")) == ENDS[name]
    assert tokenizer.convert_ids_to_tokens(stop_token(tokenizer, "here")) == ENDS[name][0]


def test_another_template_of_the_same_tokenizer_has_another_end() -> None:
    tokenizer = demo("phi 3")
    assert tokenizer.convert_ids_to_tokens(stop_token(tokenizer, "here")) == "<|end|>"
    tokenizer.chat_template = "{%- for m in messages -%}{{- m['content'] + eos_token -}}{%- endfor -%}"
    assert stop_token(tokenizer, "here") == tokenizer.eos_token_id


def test_thoughts_in_the_data_are_learned_where_the_template_shows_them() -> None:
    tokenizer, marked = demo("qwen 3"), demo("qwen 3", marked=True)
    thinking = [TURNS[0], {"role": "assistant", "content": "<think>\nOne more.\n</think>\n\nIt is 3."}]
    first, last = encode_conversation(tokenizer, [*thinking, *TURNS[2:4]], "here")
    assert (first.tokens, first.loss_mask) == theirs(marked, thinking)
    assert "One more." in tokenizer.decode(first.tokens)
    assert "One more." not in tokenizer.decode(last.tokens)
    learned = [t for t, m in zip(last.tokens, last.loss_mask, strict=True) if m]
    assert tokenizer.decode(learned) == "<think>\n\n</think>\n\nBye\n\nnow<|im_end|>"


def test_marks_of_the_template_decide_what_is_learned() -> None:
    """Its author may leave the empty thoughts out."""
    marked = demo("qwen 3", marked=True)
    marked.chat_template = marked.chat_template.replace(MARK, "", 1).replace(
        "{{- parts[-1]", MARK + "{{- parts[-1]", 1
    )
    (encoded,) = encode_conversation(marked, TURNS[:2], "here")
    assert (encoded.tokens, encoded.loss_mask) == theirs(marked, TURNS[:2])
    learned = [t for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True) if m]
    assert marked.decode(learned) == "It is 3, as I said.<|im_end|>"
    # Marks around the role only.
    marked.chat_template = (
        "{%- for m in messages -%}"
        + MARK
        + "{{- m['role'] + '|' -}}"
        + END
        + "{{- m['content'] + '<|im_end|>' -}}"
        "{%- endfor -%}{{- 'assistant|' if add_generation_prompt -}}"
    )
    with pytest.raises(InputError, match="f, line 3: .* leave nothing of the answers to learn"):
        encode_conversation(marked, TURNS[:2], "f, line 3")


def test_the_date_is_todays() -> None:
    tokenizer = demo("llama 3")
    before = datetime.datetime.now().strftime("%d %b %Y")
    text = tokenizer.decode(encode_conversation(tokenizer, TURNS[:2], "here")[0].tokens)
    assert any(f"Today Date: {day}" in text for day in (before, datetime.datetime.now().strftime("%d %b %Y")))


def test_a_prompt_and_its_answer_are_of_one_moment() -> None:
    """A template may ask for microseconds."""
    tokenizer = demo("llama 3")
    tokenizer.chat_template = tokenizer.chat_template.replace("%d %b %Y", "%H:%M:%S.%f")
    (encoded,) = encode_conversation(tokenizer, TURNS, "here")
    assert sum(encoded.loss_mask) > 3


def test_sentencepiece_does_not_give_the_text_back_and_is_taken() -> None:
    tokenizer = sentencepiece("zephyr")
    text = tokenizer.apply_chat_template(TURNS[:2], tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) != text
    assert with_template(tokenizer, "here") is tokenizer


def test_letters_that_get_lost_are_still_refused() -> None:
    """Without byte fallback and without an unknown token a piece that is not there is passed over."""
    words = Tokenizer(models.BPE({c: n for n, c in enumerate(["s", "/", "y", "e", "<end>"])}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{%- for m in messages -%}{{- m['content'] + eos_token -}}{%- endfor -%}"
    with pytest.raises(InputError, match="writes text that the tokenizer cannot encode"):
        with_template(tokenizer, "here")


# ---- refused sample by sample ----------------------------------------------------------------------------------


def conversation(line: int, messages: list[dict[str, str]]) -> Conversation:
    return Conversation(messages, f"f.jsonl, line {line}")


def mixed() -> list[Conversation]:
    """Of five conversations two have a system's message, and one a tool's result."""
    tool = [TURNS[0], TURNS[1], {"role": "tool", "content": "3"}, TURNS[3]]
    samples = [TURNS[:2], [SYSTEM, *TURNS[:2]], TURNS, tool, [SYSTEM, *TURNS]]
    return [conversation(n, messages) for n, messages in enumerate(samples, 1)]


def test_what_a_template_does_not_take_is_counted_and_refused_or_left_out() -> None:
    tokenizer = with_template(demo("gemma"), "here")
    with pytest.raises(InputError) as caught:
        fit_conversations(tokenizer, mixed(), 512, "refuse")
    told = str(caught.value)
    assert told.startswith("f.jsonl, line 2: the chat template cannot render it (System role not supported)")
    assert "3 of 5 records cannot be used (f.jsonl:2, 4, 5)" in told
    assert "data.bad_records=skip" in told
    kept, fitted = fit_conversations(tokenizer, mixed(), 512, "refuse", "skip")
    assert [fit.sample.where for fit in kept] == ["f.jsonl, line 1", "f.jsonl, line 3"]
    assert (fitted.samples, fitted.refused) == (5, 3)


def test_where_nothing_is_left_to_learn_it_is_refused(tmp_path: Path) -> None:
    only = [conversation(2, [SYSTEM, *TURNS[:2]]), conversation(7, [SYSTEM, *TURNS])]
    with pytest.raises(InputError, match=r"^align.train: f.jsonl, line 2: .*all 2 records are like this"):
        encode_split(
            only,
            demo("gemma"),
            name="align.train",
            seq_length=512,
            overlong="refuse",
            directory=tmp_path,
            bad_records="skip",
        )
    assert not list(tmp_path.iterdir())


def test_a_system_message_can_go_into_the_users_turn() -> None:
    tokenizer = demo("gemma")
    kept, fitted = fit_conversations(tokenizer, merged([mixed()[1]], True), 512, "refuse")
    assert fitted.refused == 0
    (encoded,) = kept[0].encoded
    assert "user\nBe brief.\n\nAdd 1 and 2.<end_of_turn>" in tokenizer.decode(encoded.tokens)
    (same,) = merged([mixed()[0]], True)
    assert same == mixed()[0]


def test_a_split_has_a_sample_for_each_answer_of_a_template_that_rewrites(tmp_path: Path) -> None:
    split = encode_split(
        [conversation(1, TURNS), conversation(2, TURNS[:2])],
        demo("qwen 3"),
        name="align.train",
        seq_length=512,
        overlong="refuse",
        directory=tmp_path,
    )
    assert (split.samples, split.refused) == (4, 0)
    assert len(Path(split.path).read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["gemma", "qwen 3", "mistral 0.3", "two ends"])
def test_preferences_are_of_the_last_answer(name: str, tmp_path: Path) -> None:
    """Earlier answers lie in the prompt as the template shows them there; prompt and response make one text."""
    tokenizer = with_template(demo(name), "here")
    pair = Preference(TURNS[:3], "Bye", "No\nway", "p.jsonl, line 1")
    kept, _ = fit_preferences(tokenizer, [pair], 512, "refuse")
    whole = [
        tokenizer.apply_chat_template([*TURNS[:3], {"role": "assistant", "content": c}])
        for c in ("Bye", "No\nway")
    ]
    assert [each.tokens for each in kept[0].encoded] == whole
    split = encode_pairs(
        [pair],
        tokenizer,
        name="align.train",
        seq_length=512,
        overlong="refuse",
        preference_loss="dpo",
        directory=tmp_path,
    )
    (line,) = map(json.loads, Path(split.path).read_text().splitlines())
    for answer, tokens in zip(("chosen_response", "rejected_response"), whole, strict=True):
        assert tokenizer.encode(line["prompt"] + line[answer], add_special_tokens=False) == tokens
    assert line["prompt"] == tokenizer.apply_chat_template(
        TURNS[:3], tokenize=False, add_generation_prompt=True
    )
