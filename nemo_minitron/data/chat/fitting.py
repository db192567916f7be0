"""Conversations and preference pairs that a context and a chat template take, and the count of the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from nemo_minitron.data.bad_records import REFUSE, BadRecords
from nemo_minitron.data.chat.conversations import Conversation, Message, Preference, clean
from nemo_minitron.data.chat.encoding import (
    Encoded,
    encode_answer,
    encode_conversation,
    render_prompt,
    token_ids,
)
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("drop", "cut", "refuse")


@dataclass(frozen=True)
class Fitted:
    """What became of samples that had to fit a context; `samples` came in.

    `dropped` were too long and did not go on, `refused` cannot be trained on with the chat template and did neither;
    `cut` lost later exchanges or an answer's end; `longest` is in tokens, before anything was dropped or cut.
    """

    samples: int
    dropped: int
    cut: int
    longest: int
    refused: int = 0

    def line(self, max_tokens: int) -> str:
        """For people: nothing is dropped silently."""
        refused = f", {self.refused} refused" if self.refused else ""
        return (
            f"{self.samples} samples, the longest {self.longest} tokens, context {max_tokens}: "
            f"{self.dropped} dropped, {self.cut} cut{refused}"
        )


SampleT = TypeVar("SampleT", Conversation, Preference)


@dataclass(frozen=True)
class Fit(Generic[SampleT]):
    """A sample that fits, in tokens: a conversation's samples, or the chosen and the rejected answer."""

    sample: SampleT
    encoded: list[Encoded]


def fit_conversations(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Iterable[Conversation],
    max_tokens: int,
    overlong: str,
    bad_records: str = REFUSE,
) -> tuple[list[Fit[Conversation]], Fitted]:
    """The conversations that fit a context, and what became of the others.

    Args:
        max_tokens: how many tokens a conversation may have.
        overlong: "drop" leaves a longer one out; "cut" leaves out its last exchanges and, where the first one alone is
            too long, the end of its answer; "refuse" ends the work.
        bad_records: whether conversations that `encode_conversation` refuses end the work ("refuse") or are left out
            ("skip").

    Raises:
        InputError: an invalid choice, a sample that is too long under "refuse", an answer that is empty after a
            cut, nothing left, or as `encode_conversation`; each names the file and the line.
    """

    def encode(sample: Conversation) -> list[Encoded]:
        return encode_conversation(tokenizer, sample.messages, sample.where)

    def cut(sample: Conversation) -> Conversation:
        return _cut(tokenizer, sample, max_tokens)

    return _fit(conversations, encode, cut, max_tokens, overlong, bad_records, "conversations")


def fit_preferences(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Iterable[Preference],
    max_tokens: int,
    overlong: str,
    bad_records: str = REFUSE,
) -> tuple[list[Fit[Preference]], Fitted]:
    """The pairs whose answers both fit a context; "cut" is refused, since a cut answer is not the one that was judged.

    Raises:
        InputError: as `fit_conversations`.
    """
    if overlong == "cut":
        raise InputError("overlong=cut: the answers of a preference pair are not cut; choose drop or refuse")

    def encode(pair: Preference) -> list[Encoded]:
        return [
            encode_answer(tokenizer, [*pair.messages, _answer(text)], pair.where)
            for text in (pair.chosen, pair.rejected)
        ]

    return _fit(pairs, encode, lambda pair: pair, max_tokens, overlong, bad_records, "pairs")


def _fit(
    samples: Iterable[SampleT],
    encode: Callable[[SampleT], list[Encoded]],
    cut: Callable[[SampleT], SampleT],
    max_tokens: int,
    overlong: str,
    bad_records: str,
    what: str,
) -> tuple[list[Fit[SampleT]], Fitted]:
    if overlong not in OVERLONG:
        raise InputError(f"overlong={overlong}: must be one of {', '.join(OVERLONG)}")
    kept: list[Fit[SampleT]] = []
    bad = BadRecords(bad_records, what)
    dropped = shortened = longest = 0
    for sample in samples:
        bad.read += 1
        try:
            encoded = encode(sample)
        except InputError as error:
            bad.add(sample.where.replace(", line ", ":"), error)
            continue
        length = max(len(each.tokens) for each in encoded)
        longest = max(longest, length)
        if length <= max_tokens:
            kept.append(Fit(sample, encoded))
        elif overlong == "drop":
            dropped += 1
        else:
            _refuse_if(overlong, length, max_tokens, sample.where)
            shorter = cut(sample)
            kept.append(Fit(shorter, encode(shorter)))
            shortened += 1
    bad.finish()
    fitted = Fitted(bad.read, dropped, shortened, longest, bad.bad)
    if not kept:
        raise InputError(f"nothing is left to learn of the {what}: {fitted.line(max_tokens)}")
    return kept, fitted


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


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
        if _longest(tokenizer, shorter, where) <= max_tokens:
            return replace(conversation, messages=shorter)
    prompt, answer = messages[: answers[0]], messages[answers[0]]["content"]
    pieces = token_ids(tokenizer, answer)
    room = max_tokens - len(render_prompt(tokenizer, prompt, where))
    for count in range(min(room, len(pieces)), 0, -1):
        # A cut inside of a character leaves a replacement character behind.
        beginning = clean(tokenizer.decode(pieces[:count], clean_up_tokenization_spaces=False).rstrip("�"))
        shorter = [*prompt, _answer(beginning)]
        if beginning.strip() and _longest(tokenizer, shorter, where) <= max_tokens:
            return replace(conversation, messages=shorter)
    raise InputError(
        f"{where}: the answer is empty after truncation: the prompt alone has {max_tokens - room} of the context's "
        f"{max_tokens} tokens"
    )


def _longest(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> int:
    return max(len(each.tokens) for each in encode_conversation(tokenizer, messages, where))
