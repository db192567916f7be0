"""Preference pairs on their way to NeMo-Aligner's DPO: rendered once, before ranks start, as text that its data set
tokenizes."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.alignment.conversations import EncodedSplit, write_rows
from nemo_minitron.data.chat.conversations import Preference
from nemo_minitron.data.chat.template import encode_conversation, fit_preferences
from nemo_minitron.data.rendering import render
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("nemo_minitron")
REWARDED = ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
LOSSES = ("dpo", "ipo", *REWARDED)


def encode_pairs(
    pairs: Iterable[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    seq_length: int,
    overlong: str,
    preference_loss: str,
    directory: Path,
) -> EncodedSplit:
    """Write each pair as Aligner's `DPOModelDataset` reads it (nemo_aligner/data/nlp/datasets.py@0.7.0): the prompt's
    text, and what each answer appends to it.

    Args:
        tokenizer: with its chat template.
        name: of the split, for the log and refusals.
        seq_length: the context in tokens; both answers of a pair must fit.
        longer: what is done with pairs that do not: "refuse" or "drop".
        preference_loss: one of `LOSSES`; the reward-aware ones need rewards in every pair.
        directory: where the file goes.

    Raises:
        InputError: as `fit_preferences`; a pair without the rewards that the loss compares with.
    """
    try:
        kept, fitted = fit_preferences(tokenizer, _with_rewards(pairs, preference_loss), seq_length, overlong)
    except InputError as error:
        raise InputError(f"align.{name}: {error}".replace("overlong=", "align.overlong=")) from None
    logger.info("%s: %s", name, fitted.line(seq_length))
    encoded = [_encoded(tokenizer, pair, text) for pair in kept for text in (pair.chosen, pair.rejected)]
    return EncodedSplit(
        str(write_rows((_line(tokenizer, pair) for pair in kept), directory)),
        samples=len(kept),
        dropped=fitted.dropped,
        cut=fitted.cut,
        tokens=sum(len(sample.tokens) for sample in encoded),
        answer_tokens=sum(sum(sample.loss_mask) for sample in encoded),
    )


def _with_rewards(pairs: Iterable[Preference], preference_loss: str) -> Iterable[Preference]:
    for pair in pairs:
        if preference_loss in REWARDED and pair.chosen_reward is None:
            raise InputError(
                f"{pair.where}: no chosen_reward and rejected_reward, which align.dpo.preference_loss="
                f"{preference_loss} compares with"
            )
        yield pair


def _encoded(tokenizer: "PreTrainedTokenizerBase", pair: Preference, answer: str) -> Any:
    messages = [*pair.messages, {"role": "assistant", "content": answer}]
    return encode_conversation(tokenizer, messages, pair.where)


def _line(tokenizer: "PreTrainedTokenizerBase", pair: Preference) -> dict[str, Any]:
    def text(*answer: str) -> str:
        messages = [*pair.messages, *({"role": "assistant", "content": content} for content in answer)]
        return render(tokenizer, messages, pair.where, prompt=not answer)

    prompt = text()
    rewards = {"chosen_reward": pair.chosen_reward, "rejected_reward": pair.rejected_reward}
    return {
        "prompt": prompt,
        "chosen_response": text(pair.chosen).removeprefix(prompt),
        "rejected_response": text(pair.rejected).removeprefix(prompt),
        **{name: value for name, value in rewards.items() if value is not None},
    }
