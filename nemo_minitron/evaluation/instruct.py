"""Instruct evaluation: greedy answers of a Hugging Face model to held-out prompts, scored by programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron.data.chat.conversations import Conversation, Message, merged, read_conversations
from nemo_minitron.data.chat.encoding import render_prompt, stop_tokens
from nemo_minitron.data.instruct.checks import share_passed
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """A prompt and what decides on its answer.

    Attributes:
        tokens: ids of the prompt, the beginning of the assistant's turn included.
        reference: the answer in the file, which scores 1.
        lenient: what decides whether a careful reader would call an answer right; as `checks` where the file has none.
    """

    where: str
    category: str
    family: str
    messages: list[Message]
    tokens: list[int]
    reference: str
    checks: list[dict[str, Any]]
    lenient: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What a model said. `finished`: it ended the answer itself. `share`: of the checks that hold, in [0, 1];
    `lenient`: all of the lenient ones do, or all of the strict ones.
    """

    text: str
    finished: bool
    share: float
    lenient: bool


def load_items(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    max_new_tokens: int,
    merge_system: bool = False,
) -> list[Item]:
    """The prompts of a file of conversations with `category` and `checks`: all turns but the last answer.

    Args:
        context: of the model, in tokens.
        max_new_tokens: room that each answer must have in it.
        merge_system: put a system's text in front of the user's first.

    Raises:
        InputError: names file and line: no such file, no conversation, no category, no checks or one that the file's
            own answer does not pass, or a prompt that leaves too little room.
    """
    samples = merged(read_conversations(path), merge_system)
    return [_item(sample, tokenizer, context, max_new_tokens) for sample in samples]


def _item(
    sample: Conversation, tokenizer: "PreTrainedTokenizerBase", context: int, max_new_tokens: int
) -> Item:
    where, extra = sample.where, sample.extra
    category = extra.get("category")
    if not isinstance(category, str) or not category.isidentifier():
        raise InputError(f"{where}: category={category!r}: must be a name such as 'passage'")
    *prompt, answer = sample.messages
    checks = _checks("checks", extra.get("checks"), answer["content"], where)
    lenient = _checks("lenient", extra.get("lenient", checks), answer["content"], where)
    tokens = render_prompt(tokenizer, prompt, where)
    if len(tokens) + max_new_tokens > context:
        raise InputError(
            f"{where}: the prompt has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} that is more than "
            f"the model's context of {context}"
        )
    return Item(
        where, category, str(extra.get("family", "")), prompt, tokens, answer["content"], checks, lenient
    )


def _checks(name: str, checks: Any, answer: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise InputError(f"{where}: {name}: must be a list of objects, see docs/instruct_data.md")
    if (share := share_passed(checks, answer, where)) < 1:
        raise InputError(f"{where}: its own answer passes only {share:.0%} of its {name}")
    return checks


def answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    items: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of the items.

    transformers' `generate` with its key-value cache does the work, over prompts that are padded on the left and
    sorted by length. Nothing of the model's own generation settings counts.

    Args:
        model: on the device where it shall run; it is in evaluation mode afterwards.
        max_new_tokens: after which an answer is cut, and counts as it is then.
        progress: called with the number of items that are finished.

    Raises:
        InputError: the tokenizer's template does not end answers.
    """
    stops = stop_tokens(tokenizer, "the tokenizer")
    model.eval()
    # Longest first: what does not fit in memory does not fit at the beginning.
    order = sorted(range(len(items)), key=lambda i: -len(items[i].tokens))
    found: dict[int, Answer] = {}
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        new = _generate(model, [items[i].tokens for i in indices], stops, max_new_tokens)
        for index, tokens in zip(indices, new, strict=True):
            found[index] = _answer(tokenizer, items[index], tokens, stops)
        if progress is not None:
            progress(len(found))
    return [found[i] for i in range(len(items))]


def _generate(
    model: "PreTrainedModel", prompts: list[list[int]], stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    from transformers import GenerationConfig

    tokens, mask = _left_padded(prompts, stops[0])
    # The end marker pads too: what comes after the first one is cut off, and what is left of the prompt is masked.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=[*stops],
        pad_token_id=stops[0],
    )
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model.generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy,
            use_model_defaults=False,
        )
    return output[:, tokens.shape[1] :].tolist()


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, int64 [b, s]."""
    length = max(map(len, prompts))
    tokens = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


def _answer(
    tokenizer: "PreTrainedTokenizerBase", item: Item, tokens: list[int], stops: Sequence[int]
) -> Answer:
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    said = tokens[:end]
    text = str(tokenizer.decode(said, clean_up_tokenization_spaces=False))
    share = share_passed(item.checks, text, item.where)
    lenient = share == 1 or share_passed(item.lenient, text, item.where) == 1
    return Answer(text, end is not None, share, lenient)


def scores(items: Sequence[Item], said: Sequence[Answer]) -> dict[str, float | int]:
    """Flat figures, by category in the order of the file and over all.

    `X_score`: the share of the answers that pass all of their checks, in [0, 1]; `X_score_lenient`: of those that a
    careful reader would call right; `X_checks`: the mean share of an answer's checks that hold; `X_samples`. Then the
    same as `overall_...`, `samples`, and `unfinished`: answers that were cut.
    """
    fields: dict[str, float | int] = {}
    for category in dict.fromkeys(item.category for item in items):
        own = [a for i, a in zip(items, said, strict=True) if i.category == category]
        fields |= {**_means(category, own), f"{category}_samples": len(own)}
    return {
        **fields,
        **_means("overall", said),
        "samples": len(said),
        "unfinished": sum(not a.finished for a in said),
    }


def _means(name: str, said: Sequence[Answer]) -> dict[str, float]:
    return {
        f"{name}_score": sum(a.share == 1 for a in said) / len(said),
        f"{name}_score_lenient": sum(a.lenient for a in said) / len(said),
        f"{name}_checks": sum(a.share for a in said) / len(said),
    }


def rows(items: Sequence[Item], said: Sequence[Answer]) -> list[dict[str, Any]]:
    """What to write down of each item, for people who wonder about a score."""
    return [
        {
            "category": item.category,
            "family": item.family,
            "messages": item.messages,
            "reference": item.reference,
            "answer": answer.text,
            "finished": answer.finished,
            "checks_passed": answer.share,
            "lenient": answer.lenient,
        }
        for item, answer in zip(items, said, strict=True)
    ]
