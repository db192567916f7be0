"""Chat templates: Jinja in a tokenizer's `tokenizer_config.json`, as Hugging Face keeps them, and what they make of
conversations in tokens.

One string serves training, evaluation and export: it lies with the tokenizer, and nothing here renders in another way
than `apply_chat_template`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.data.chat.conversations import Conversation, Message, Preference, clean
from nemo_minitron.data.rendering import render, try_template
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The default. Each turn begins with the end-of-text token, which in packed pretraining text stands before every
# document and which every tokenizer here has; the one after an answer ends it, and is the answer's own. It is the
# format of NeMo's GPTSFTChatDataset with system_turn_start = turn_start = eos, end_of_name = "\n" and end_of_turn = "",
# down to the turn start that NeMo puts after the last answer, and to the system turn that it always writes
# (nemo/collections/nlp/data/language_modeling/megatron/gpt_sft_chat_dataset.py@2.4.1).
CHAT_TEMPLATE = (
    "{%- set ns = namespace(open=true) -%}"
    "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    "{{- eos_token + 'System\\n' + (messages[0]['content'] if has_system else '') -}}"
    "{%- for message in (messages[1:] if has_system else messages) -%}"
    "{%- if message['role'] not in ('user', 'assistant', 'tool') -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- if ns.open -%}{{- eos_token -}}{%- endif -%}"
    "{{- message['role'] | capitalize + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- set ns.open = false -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- set ns.open = true -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- (eos_token if ns.open else '') + 'Assistant\\n' -}}"
    "{%- endif -%}"
)
CONFIG = "tokenizer_config.json"
OVERLONG = ("drop", "cut", "refuse")
_PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "no"},
]


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens. `loss_mask`: 1 where a token is an answer's (its end marker included), else 0."""

    tokens: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class Fitted:
    """What became of samples that had to fit a context; `samples` came in, `dropped` of them did not go on.

    `cut` lost later exchanges or an answer's end; `longest` is in tokens, before anything was dropped or cut.
    """

    samples: int
    dropped: int
    cut: int
    longest: int

    def line(self, max_tokens: int) -> str:
        """For people: nothing is dropped silently."""
        return (
            f"{self.samples} samples, the longest {self.longest} tokens, context {max_tokens}: "
            f"{self.dropped} dropped, {self.cut} cut"
        )


def attach_template(directory: str | Path, template: str | None = None) -> str:
    """Give a tokenizer directory a chat template if it has none, and return the one that it has then.

    Args:
        directory: of a Hugging Face tokenizer; its `tokenizer_config.json` is written atomically.
        template: Jinja; null: `CHAT_TEMPLATE`.

    Raises:
        InputError: no tokenizer there, or one with another template than the given one.
    """
    path = Path(directory) / CONFIG
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    present = config.get("chat_template")
    if present is not None:
        if template is not None and present != template:
            raise InputError(f"{path}: has another chat template than the one that is to be attached")
        return str(present)
    config["chat_template"] = template or CHAT_TEMPLATE
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return str(config["chat_template"])


def with_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> "PreTrainedTokenizerBase":
    """The tokenizer, with `CHAT_TEMPLATE` if it has no template, after `check_template`; `save_pretrained` keeps it.

    Raises:
        InputError: as `check_template`.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    check_template(tokenizer, where)
    return tokenizer


def check_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Refuse a template that cannot be trained and decoded with.

    A short conversation must render, its tokens must give its text back (nothing unknown), the prompt of each answer
    must be the beginning of what goes on from it, and an answer must have an end marker.

    Args:
        where: what a refusal begins with, such as a tokenizer's directory.

    Raises:
        InputError: which of these does not hold.
    """
    try_template(tokenizer, [_PROBE, _PROBE[1:], _PROBE[:3], _PROBE[1:3]], where)
    text = render(tokenizer, _PROBE, where)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    if (unknown is not None and unknown in tokens) or tokenizer.decode(
        tokens, clean_up_tokenization_spaces=False
    ) != text:
        raise InputError(
            f"{where}: the chat template writes text that the tokenizer cannot encode: {text[:80]!r} comes back as "
            f"{tokenizer.decode(tokens)[:80]!r}"
        )
    encode_conversation(tokenizer, _PROBE, where)
    stop_token(tokenizer, where)


def stop_token(tokenizer: "PreTrainedTokenizerBase", where: str) -> int:
    """The id of the token that ends an answer in the tokenizer's template; decoding stops there.

    Raises:
        InputError: the template does not end answers.
    """
    whole = _tokens(tokenizer, render(tokenizer, _PROBE[:3], where))
    prompt = render(tokenizer, _PROBE[:2], where, prompt=True)
    content = _tokens(tokenizer, prompt + _PROBE[2]["content"])
    if whole[: len(content)] != content or len(whole) == len(content):
        raise InputError(f"{where}: the chat template has no marker that ends an answer")
    return whole[len(content)]


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> list[int]:
    """Token ids of a prompt: the messages, and the beginning of the assistant's turn.

    Raises:
        InputError: the template refuses the messages, or one of them holds a control token.
    """
    _refuse_control_tokens(tokenizer, messages, where)
    return _tokens(tokenizer, render(tokenizer, messages, where, prompt=True))


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str
) -> Encoded:
    """Token ids of a whole conversation, as `apply_chat_template` gives them, and which of them are answers.

    Each answer is what comes after its prompt, rendered on its own; that both are beginnings of the whole is checked.

    Raises:
        InputError: the template refuses the messages, a message holds a control token, or a prompt is not the
            beginning of what follows it, in tokens (a template that rewrites earlier turns, or a tokenizer that joins
            the prompt's end with the answer).
    """
    _refuse_control_tokens(tokenizer, messages, where)
    whole = _tokens(tokenizer, render(tokenizer, messages, where))
    mask = [0] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = _tokens(tokenizer, render(tokenizer, messages[:index], where, prompt=True))
        end = _tokens(tokenizer, render(tokenizer, messages[: index + 1], where))
        if end[: len(begin)] != begin or whole[: len(end)] != end:
            raise InputError(
                f"{where}, message {index + 1}: the prompt's tokens are not the beginning of the conversation's: the "
                "chat template rewrites earlier turns, or the tokenizer joins the prompt's end with the answer"
            )
        mask[len(begin) : len(end)] = [1] * (len(end) - len(begin))
    return Encoded(whole, mask)


def _refuse_control_tokens(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str
) -> None:
    """A special token inside a text would open or close turns."""
    # `all_special_tokens` alone lacks those that have no name, such as Llama 3's turn marks.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for number, message in enumerate(messages, start=1):
        for token in sorted(special):
            if token in message["content"]:
                raise InputError(
                    f"{where}, message {number}: holds {token}, a control token of the tokenizer; texts must not"
                )


def fit_conversations(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Iterable[Conversation],
    max_tokens: int,
    overlong: str,
) -> tuple[list[Conversation], Fitted]:
    """The conversations that fit a context, and what became of the others.

    Args:
        max_tokens: how many tokens a conversation may have.
        too_long: "drop" leaves a longer one out; "cut" leaves out its last exchanges and, where the first one alone is
            too long, the end of its answer; "refuse" ends the work.

    Raises:
        InputError: an invalid choice, a sample that is too long under "refuse", an answer that is empty after a
            cut, nothing left, or as `encode_conversation`; each names the file and the line.
    """
    _check_choice(overlong)
    kept: list[Conversation] = []
    samples = dropped = cut = longest = 0
    for conversation in conversations:
        samples += 1
        length = len(encode_conversation(tokenizer, conversation.messages, conversation.where).tokens)
        longest = max(longest, length)
        if length <= max_tokens:
            kept.append(conversation)
        elif overlong == "drop":
            dropped += 1
        else:
            _refuse_if(overlong, length, max_tokens, conversation.where)
            kept.append(_cut(tokenizer, conversation, max_tokens))
            cut += 1
    fitted = Fitted(samples, dropped, cut, longest)
    if not kept:
        raise InputError(f"no conversation fits: {fitted.line(max_tokens)}")
    return kept, fitted


def fit_preferences(
    tokenizer: "PreTrainedTokenizerBase", pairs: Iterable[Preference], max_tokens: int, overlong: str
) -> tuple[list[Preference], Fitted]:
    """The pairs whose answers both fit a context; "cut" is refused, since a cut answer is not the one that was judged.

    Raises:
        InputError: as `fit_conversations`.
    """
    _check_choice(overlong)
    if overlong == "cut":
        raise InputError("overlong=cut: the answers of a preference pair are not cut; choose drop or refuse")
    kept: list[Preference] = []
    samples = dropped = longest = 0
    for pair in pairs:
        samples += 1
        length = max(
            len(encode_conversation(tokenizer, [*pair.messages, _answer(text)], pair.where).tokens)
            for text in (pair.chosen, pair.rejected)
        )
        longest = max(longest, length)
        if length <= max_tokens:
            kept.append(pair)
        else:
            _refuse_if(overlong, length, max_tokens, pair.where)
            dropped += 1
    fitted = Fitted(samples, dropped, 0, longest)
    if not kept:
        raise InputError(f"no pair fits: {fitted.line(max_tokens)}")
    return kept, fitted


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _check_choice(overlong: str) -> None:
    if overlong not in OVERLONG:
        raise InputError(f"overlong={overlong}: must be one of {', '.join(OVERLONG)}")


def _refuse_if(overlong: str, length: int, max_tokens: int, where: str) -> None:
    if overlong == "refuse":
        raise InputError(
            f"{where}: {length} tokens, the context has {max_tokens}; overlong=drop or cut lets the others pass"
        )


def _cut(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, max_tokens: int) -> Conversation:
    """The first exchanges that fit, or the first one with its answer's beginning."""
    messages, where = conversation.messages, conversation.where
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for last in reversed(answers[:-1]):
        shorter = messages[: last + 1]
        if len(encode_conversation(tokenizer, shorter, where).tokens) <= max_tokens:
            return replace(conversation, messages=shorter)
    prompt, answer = messages[: answers[0]], messages[answers[0]]["content"]
    pieces = _tokens(tokenizer, answer)
    room = max_tokens - len(render_prompt(tokenizer, prompt, where))
    for count in range(min(room, len(pieces)), 0, -1):
        # A cut inside of a character leaves a replacement character behind.
        beginning = clean(tokenizer.decode(pieces[:count], clean_up_tokenization_spaces=False).rstrip("�"))
        shorter = [*prompt, _answer(beginning)]
        if beginning.strip() and len(encode_conversation(tokenizer, shorter, where).tokens) <= max_tokens:
            return replace(conversation, messages=shorter)
    raise InputError(
        f"{where}: the answer is empty after truncation: the prompt alone has {max_tokens - room} of the context's "
        f"{max_tokens} tokens"
    )
