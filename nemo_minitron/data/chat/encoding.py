"""Conversations in tokens: what a tokenizer's chat template makes of them, and which of the tokens are learned.

Nothing here renders in another way than `apply_chat_template`, and every sample is what a model would be shown: a
prompt as the template writes it, and what follows. Templates that rewrite earlier turns (Qwen3's takes the thinking out
of them, Mistral 0.3's moves the system's text into the last user's turn) show each answer in a text of its own, so
there an answer is a sample of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from nemo_minitron.data.chat.conversations import Message
from nemo_minitron.data.rendering import marked_tokens, render
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "yes"
PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "no"},
]


@dataclass(frozen=True)
class Encoded:
    """A sample in tokens. `loss_mask`: 1 where a token is an answer's (its end marker included), else 0."""

    tokens: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class _Turn:
    """An answer: its message's number, the tokens of its prompt, and those of the conversation up to its end."""

    index: int
    prompt: list[int]
    through: list[int]


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Without the tokens that a tokenizer adds by itself: a template writes its own."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> list[int]:
    """Token ids of a prompt: the messages, and the beginning of the assistant's turn.

    Raises:
        InputError: the template refuses the messages, or one of them holds a control token.
    """
    _refuse_control_tokens(tokenizer, messages, where)
    return token_ids(tokenizer, render(tokenizer, messages, where, prompt=True))


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str
) -> list[Encoded]:
    """The samples of a conversation, in the order of their last answers; token ids as `apply_chat_template` gives them.

    One sample holds all answers, each behind its own prompt. Where the template shows an earlier answer in another way
    once the conversation has gone on, that answer is learned in a sample which ends with it.

    Raises:
        InputError: the template refuses the messages, a message holds a control token, an answer's prompt is not the
            beginning of what follows it, in tokens (a tokenizer that joins the prompt's end with the answer), or the
            template's own marks leave nothing of an answer to learn.
    """
    _refuse_control_tokens(tokenizer, messages, where)
    left = [_turn(tokenizer, messages, i, where) for i, m in enumerate(messages) if m["role"] == "assistant"]
    found: list[Encoded] = []
    while left:
        last = left[-1]
        spans = {turn.index: _learned(tokenizer, turn, last.through, where) for turn in left}
        shown = [span for span in spans.values() if span]
        found.append(_masked(tokenizer, messages[: last.index + 1], last.through, shown, where))
        left = [turn for turn in left if not spans[turn.index]]
    return found[::-1]


def encode_answer(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> Encoded:
    """The conversation as the template shows it with its last answer, which alone is learned.

    Raises:
        InputError: as `encode_conversation`.
    """
    _refuse_control_tokens(tokenizer, messages, where)
    turn = _turn(tokenizer, messages, len(messages) - 1, where)
    span = _learned(tokenizer, turn, turn.through, where)
    return _masked(tokenizer, messages, turn.through, [span], where)


def _turn(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], index: int, where: str) -> _Turn:
    prompt = token_ids(tokenizer, render(tokenizer, messages[:index], where, prompt=True))
    through = token_ids(tokenizer, render(tokenizer, messages[: index + 1], where))
    if through[: len(prompt)] != prompt:
        raise InputError(
            f"{where}, message {index + 1}: the prompt's tokens are not the beginning of the conversation's: the chat "
            "template writes another prompt than it is trained with, or the tokenizer joins the prompt's end with the "
            "answer"
        )
    return _Turn(index, prompt, through)


def _learned(tokenizer: "PreTrainedTokenizerBase", turn: _Turn, tokens: Sequence[int], where: str) -> range:
    """Where an answer and its end marker lie in a sample; empty where the sample shows the answer in another way."""
    begin, end = len(turn.prompt), len(turn.through)
    # What comes after the marker, such as ChatML's line end, is the next turn's: no decoding goes as far.
    stops = [s for s in stop_tokens(tokenizer, where) if _is_special(tokenizer, s)]
    end = next((i + 1 for i in range(begin, end) if turn.through[i] in stops), end)
    return range(begin, end) if list(tokens[:end]) == turn.through[:end] else range(0)


def _masked(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tokens: list[int],
    spans: Sequence[range],
    where: str,
) -> Encoded:
    """Of the answers' tokens those that the template's `{% generation %}` marks name, all where it has none."""
    marks = marked_tokens(tokenizer, messages, where)
    mask = [0] * len(tokens)
    for i in (i for span in spans for i in span):
        mask[i] = 1 if marks is None else marks[i]
    if not any(mask):
        raise InputError(
            f"{where}: the chat template's generation marks leave nothing of the answers to learn"
        )
    return Encoded(tokens, mask)


# ---- where an answer ends ------------------------------------------------------------------------------------

_STOPS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, tuple[int, ...]]]" = WeakKeyDictionary()


def stop_token(tokenizer: "PreTrainedTokenizerBase", where: str) -> int:
    """The id of the token that ends a conversation's last answer in the tokenizer's template.

    Raises:
        InputError: the template does not end answers.
    """
    return stop_tokens(tokenizer, where)[0]


def stop_tokens(tokenizer: "PreTrainedTokenizerBase", where: str) -> tuple[int, ...]:
    """The ids of all tokens that end an answer in the tokenizer's template; decoding stops at any of them.

    The first one ends a conversation's last answer; a template may end one that a user's or a tool's turn follows with
    another.

    Raises:
        InputError: the template does not end answers.
    """
    template = str(tokenizer.chat_template)
    known = _STOPS.get(tokenizer)
    if known is None or known[0] != template:
        known = (template, tuple(dict.fromkeys(_ends(tokenizer, where))))
        _STOPS[tokenizer] = known
    return known[1]


def simplest(tokenizer: "PreTrainedTokenizerBase", where: str) -> list[Message]:
    """A question and its answer that the template takes: without a system's message, or else with one.

    Raises:
        InputError: it takes neither.
    """
    try:
        render(tokenizer, PROBE[1:3], where)
        return PROBE[1:3]
    except InputError as error:
        try:
            render(tokenizer, PROBE[:3], where)
        except InputError:
            raise error from None
        return PROBE[:3]


def _ends(tokenizer: "PreTrainedTokenizerBase", where: str) -> Iterator[int]:
    messages = simplest(tokenizer, where)
    text = render(tokenizer, messages, where)
    if (end := _end(tokenizer, text)) is None:
        raise InputError(f"{where}: the chat template has no marker that ends an answer")
    yield end
    for role in ("user", "tool"):
        try:
            text = render(tokenizer, [*messages, {"role": role, "content": "And now?"}], where, prompt=True)
        except InputError:  # it knows no tools, or nobody speaks after the assistant
            continue
        if (end := _end(tokenizer, text)) is not None and _is_special(tokenizer, end):
            yield end


def _end(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """The first control token after the probe's answer, else the first token there; None where nothing is."""
    before, answer, after = text.rpartition(ANSWER)
    if not answer or not after:
        return None
    content, whole = token_ids(tokenizer, before + answer), token_ids(tokenizer, text)
    ending = whole[len(content) :] if whole[: len(content)] == content else token_ids(tokenizer, after)
    return next((token for token in ending if _is_special(tokenizer, token)), next(iter(ending), None))


def _is_special(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)


def _refuse_control_tokens(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str
) -> None:
    """A special token inside a text would open or close turns."""
    # `all_special_tokens` alone lacks those that have no name, such as Llama 3's turn marks.
    special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})
    for number, message in enumerate(messages, start=1):
        for token in special:
            if token in message["content"]:
                raise InputError(
                    f"{where}, message {number}: holds {token}, a control token of the tokenizer; texts must not"
                )
