"""The chat template: token ids by every way, NeMo's own format, answers alone in the mask, lengths, refusals."""

import json
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_minitron.data.chat.conversations import Conversation, Preference
from nemo_minitron.data.chat.encoding import encode_conversation, render_prompt, stop_token
from nemo_minitron.data.chat.fitting import fit_conversations, fit_preferences
from nemo_minitron.data.chat.template import CHAT_TEMPLATE, attach_template, with_template
from nemo_minitron.data.tokenizer import EOS
from nemo_minitron.errors import InputError

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
# ChatML, written by hand: another one with an end marker of its own.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": '{"name": "add"}'},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "    It is 3."},
    {"role": "user", "content": "Thanks é 世"},
    {"role": "assistant", "content": "Bye\n\nnow"},
]
# By hand: the format that the docs state.
TEXT = (
    f"{EOS}System\nBe brief.{EOS}User\nAdd 1 and 2.{EOS}Assistant\n"
    f'{{"name": "add"}}{EOS}Tool\n3{EOS}Assistant\n    It is 3.{EOS}User\nThanks é 世{EOS}Assistant\nBye\n\nnow{EOS}'
)
ANSWERS = [f'{{"name": "add"}}{EOS}', f"    It is 3.{EOS}", f"Bye\n\nnow{EOS}"]


@pytest.fixture
def tokenizer() -> Any:
    return with_template(AutoTokenizer.from_pretrained(str(DEMO)), "demo")


@pytest.fixture
def chatml() -> Any:
    found = AutoTokenizer.from_pretrained(str(DEMO))
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = CHATML
    return found


def test_token_ids_agree_by_every_way(tokenizer: Any) -> None:
    """Ours, apply_chat_template's with and without its own mask, and the tokens of the text written by hand."""
    (encoded,) = encode_conversation(tokenizer, MESSAGES, "here")
    assert encoded.tokens == tokenizer.encode(TEXT, add_special_tokens=False)
    assert encoded.tokens == tokenizer.apply_chat_template(MESSAGES)
    theirs = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == encoded.tokens
    assert theirs["assistant_masks"] == encoded.loss_mask


def test_a_prompt_and_its_answer_make_the_whole(tokenizer: Any) -> None:
    """As evaluation prompts and training trains: the prompt's ids, then the answer's and its end."""
    for index in (2, 4, 6):
        prompt = render_prompt(tokenizer, MESSAGES[:index], "here")
        answer = tokenizer.encode(MESSAGES[index]["content"] + EOS, add_special_tokens=False)
        assert prompt + answer == tokenizer.apply_chat_template(MESSAGES[: index + 1])
        assert prompt == tokenizer.apply_chat_template(MESSAGES[:index], add_generation_prompt=True)


def test_only_answers_and_their_ends_are_learned(tokenizer: Any) -> None:
    (encoded,) = encode_conversation(tokenizer, MESSAGES, "here")
    spans, before = [], 0
    for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True):
        if mask and not before:
            spans.append([])
        if mask:
            spans[-1].append(token)
        before = mask
    assert [tokenizer.decode(span) for span in spans] == ANSWERS


def test_without_a_system_message_its_turn_is_empty(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(MESSAGES[1:3], tokenize=False)
    assert text == f'{EOS}System\n{EOS}User\nAdd 1 and 2.{EOS}Assistant\n{{"name": "add"}}{EOS}'


def test_the_end_of_an_answer(tokenizer: Any, chatml: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(stop_token(tokenizer, "here")) == EOS
    # Not the line end that ChatML has after it.
    assert chatml.convert_ids_to_tokens(stop_token(chatml, "here")) == "<|im_end|>"


def test_a_template_without_generation_marks_is_masked_too(chatml: Any) -> None:
    (encoded,) = encode_conversation(chatml, MESSAGES[:3], "here")
    learned = [t for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True) if m]
    assert chatml.decode(learned) == '{"name": "add"}<|im_end|>'
    assert with_template(chatml, "here").chat_template == CHATML


def test_the_template_goes_with_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """Attached to a directory, loaded, saved as an export does and loaded again, it is the same string."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO / name, directory)
    before = json.loads((directory / "tokenizer_config.json").read_text())
    assert attach_template(directory) == CHAT_TEMPLATE
    after = json.loads((directory / "tokenizer_config.json").read_text())
    assert after == {**before, "chat_template": CHAT_TEMPLATE}
    AutoTokenizer.from_pretrained(str(directory)).save_pretrained(str(tmp_path / "export"))
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    assert exported.chat_template == CHAT_TEMPLATE
    assert exported.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)


def test_a_template_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert attach_template(tmp_path) == CHATML
    with pytest.raises(InputError, match="another chat template"):
        attach_template(tmp_path, CHAT_TEMPLATE)
    with pytest.raises(InputError, match="cannot be read"):
        attach_template(tmp_path / "absent")


BAD_TEMPLATES = {
    "{% for m in messages %}{{ m.content }}": "cannot render it",
    "{{ raise_exception('no chat') }}": "no chat",
    # No mark between turns: the second prompt is no beginning of what follows the first.
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}": "not the beginning",
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}": "no marker that ends an answer",
    "{{ messages[-1].content }}": "not the beginning",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_template_that_cannot_be_trained_with_is_refused(template: str) -> None:
    found = AutoTokenizer.from_pretrained(str(DEMO))
    found.chat_template = template
    with pytest.raises(InputError) as caught:
        with_template(found, "some/where")
    assert str(caught.value).startswith("some/where")
    assert BAD_TEMPLATES[template] in str(caught.value)


def test_a_template_that_the_tokenizer_cannot_encode_is_refused() -> None:
    """Words alone are in this vocabulary; the template's marks come out as unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: n for n, w in enumerate(["<unk>", "</s>", "Hello", "yes", "no", "And", "now", "Be", "brief"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(InputError, match="writes text that the tokenizer cannot encode"):
        with_template(tokenizer, "words")


def test_control_tokens_in_a_text_are_refused(tokenizer: Any) -> None:
    messages = [MESSAGES[1], {"role": "assistant", "content": f"yes{EOS}User\nno"}]
    with pytest.raises(InputError, match=r"f.jsonl, line 4, message 2: holds <\|endoftext\|>"):
        encode_conversation(tokenizer, messages, "f.jsonl, line 4")


def test_control_tokens_without_a_name_are_refused_too(tokenizer: Any) -> None:
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)], special_tokens=True)
    assert "<|turn|>" not in tokenizer.all_special_tokens
    with pytest.raises(InputError, match=r"message 1: holds <\|turn\|>"):
        render_prompt(tokenizer, [{"role": "user", "content": "a<|turn|>b"}], "here")


# ---- lengths -------------------------------------------------------------------------------------------------


def conversation(line: int, *texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Conversation(messages, f"f.jsonl, line {line}")


SHORT, LONG = conversation(1, "Hi", "yes"), conversation(2, "Hi", "yes " * 40 + "end")
TURNS = conversation(3, "Hi", "yes", "And?", "no " * 40 + "end")


def length(tokenizer: Any, sample: Conversation) -> int:
    return len(tokenizer.apply_chat_template(sample.messages))


def test_long_samples_are_dropped_and_counted(tokenizer: Any) -> None:
    limit = length(tokenizer, LONG) - 1
    kept, fitted = fit_conversations(tokenizer, [SHORT, LONG, SHORT], limit, "drop")
    assert [fit.sample for fit in kept] == [SHORT, SHORT]
    assert (fitted.samples, fitted.dropped, fitted.cut, fitted.longest) == (3, 1, 0, limit + 1)
    kept, fitted = fit_conversations(tokenizer, [SHORT, LONG], limit + 1, "drop")
    assert ([fit.sample for fit in kept], fitted.dropped) == ([SHORT, LONG], 0)
    with pytest.raises(
        InputError, match="nothing is left to learn of the conversations: 1 samples.*1 dropped"
    ):
        fit_conversations(tokenizer, [LONG], limit, "drop")


def test_long_samples_are_refused_by_file_and_line(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"f.jsonl, line 2: \d+ tokens, the context has 30"):
        fit_conversations(tokenizer, [SHORT, LONG], 30, "refuse")
    with pytest.raises(InputError, match="overlong=trim: must be one of drop, cut, refuse"):
        fit_conversations(tokenizer, [SHORT], 30, "trim")


def test_a_cut_takes_later_exchanges_first_and_then_the_answer_s_end(tokenizer: Any) -> None:
    fits, fitted = fit_conversations(tokenizer, [SHORT, LONG, TURNS], 40, "cut")
    kept = [fit.sample for fit in fits]
    assert (fitted.samples, fitted.dropped, fitted.cut) == (3, 0, 2)
    assert kept[0] == SHORT
    assert kept[2].messages == TURNS.messages[:2]
    answer = kept[1].messages[1]["content"]
    assert answer
    assert LONG.messages[1]["content"].startswith(answer)
    assert 38 <= length(tokenizer, kept[1]) <= 40


def test_a_cut_leaves_no_half_of_a_character(tokenizer: Any) -> None:
    sample = conversation(1, "Hi", "世" * 20)
    for limit in range(23, 33):
        (kept,), _ = fit_conversations(tokenizer, [sample], limit, "cut")
        assert set(kept.sample.messages[1]["content"]) == {"世"}


def test_an_answer_that_is_empty_after_the_cut_is_refused(tokenizer: Any) -> None:
    sample = conversation(9, "Hi " * 60, "yes")
    with pytest.raises(InputError, match="f.jsonl, line 9: the answer is empty after truncation"):
        fit_conversations(tokenizer, [SHORT, sample], 50, "cut")


def test_pairs_are_dropped_or_refused_but_not_cut(tokenizer: Any) -> None:
    prompt = [MESSAGES[1]]
    short = Preference(prompt, "yes", "no", "f.jsonl, line 1")
    long = Preference(prompt, "yes", "no " * 90, "f.jsonl, line 2")
    kept, fitted = fit_preferences(tokenizer, [short, long], 60, "drop")
    assert ([fit.sample for fit in kept], fitted.samples, fitted.dropped) == ([short], 2, 1)
    with pytest.raises(InputError, match="f.jsonl, line 2"):
        fit_preferences(tokenizer, [short, long], 60, "refuse")
    with pytest.raises(InputError, match="are not cut"):
        fit_preferences(tokenizer, [short], 60, "cut")


# ---- templates that never end ------------------------------------------------------------------------------

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "a division": "{{ 1 / 0 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "digits": "{{ (10 ** 5000) | string }}",
    "memory": "{{ 'x' * 10 ** 10 }}",
    "a long text": "{{ 'x' * 10 ** 8 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "parentheses": "{{" + "(" * 5000,
    "terms": "{{ " + " + ".join(["1"] * 20000) + " }}",
    "Python's objects": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_for_ever_is_refused_in_seconds(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO))
    tokenizer.chat_template = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InputError, match=r"^here: the chat template ") as caught:
        with_template(tokenizer, "here")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert len(str(caught.value).splitlines()) == 1
    assert after.ru_utime - before.ru_utime < 10
    assert after.ru_maxrss - before.ru_maxrss < 1 << 20, "more than 1 GiB in KiB"


def test_a_template_that_loops_on_some_data_only_is_stopped_in_any_thread(tokenizer: Any) -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if messages[0].content == 'loop' %}" + loops + "{% endif %}"
    with_template(tokenizer, "here")
    asked = [{"role": "user", "content": "loop"}]
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="a.jsonl, line 1.*takes too long"):
        pool.submit(render_prompt, tokenizer, asked, "a.jsonl, line 1").result()
    assert sys.gettrace() is None or "coverage" in str(sys.gettrace())
    with pytest.raises(InputError, match="takes too long"):
        render_prompt(tokenizer, asked, "a.jsonl, line 1")
