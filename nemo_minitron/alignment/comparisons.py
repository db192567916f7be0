"""Preference pairs on their way to NeMo-Aligner's DPO: rendered once, before ranks start, as text that its data set
tokenizes."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.data.bad_records import REFUSE
from nemo_minitron.data.chat.conversations import Preference
from nemo_minitron.data.chat.encoded import EncodedSplit, described, fitting, write_rows
from nemo_minitron.data.chat.fitting import fit_preferences
from nemo_minitron.data.rendering import render
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    bad_records: str = REFUSE,
) -> EncodedSplit:
    """Write each pair as Aligner's `DPOModelDataset` reads it (nemo_aligner/data/nlp/datasets.py@0.7.0): the prompt's
    text, and what each answer appends to it.

    Args:
        tokenizer: with its chat template.
        name: the setting that names the files, for the log and refusals.
        seq_length: the context in tokens; both answers of a pair must fit.
        overlong: what is done with pairs that do not: "refuse" or "drop".
        preference_loss: one of `LOSSES`; the reward-aware ones need rewards in every pair.
        directory: where the file goes.
        bad_records: what is done with pairs that cannot be trained on: "refuse" or "skip".

    Raises:
        InputError: as `fit_preferences`; a pair without the rewards that the loss compares with.
    """
    with fitting(name):
        kept, fitted = fit_preferences(
            tokenizer, _with_rewards(pairs, preference_loss), seq_length, overlong, bad_records
        )
    path = write_rows((_line(tokenizer, fit.sample) for fit in kept), directory)
    encoded = [answer for fit in kept for answer in fit.encoded]
    return described(path, len(kept), encoded, fitted, name, seq_length)


def _with_rewards(pairs: Iterable[Preference], preference_loss: str) -> Iterable[Preference]:
    for pair in pairs:
        if preference_loss in REWARDED and pair.chosen_reward is None:
            raise InputError(
                f"{pair.where}: no chosen_reward and rejected_reward, which align.dpo.preference_loss="
                f"{preference_loss} compares with"
            )
        yield pair


def _line(tokenizer: "PreTrainedTokenizerBase", pair: Preference) -> dict[str, Any]:
    def text(*answer: str) -> str:
        messages = [*pair.messages, *({"role": "assistant", "content": content} for content in answer)]
        return render(tokenizer, messages, pair.where, prompt=not answer)

    prompt = text()

    def response(answer: str) -> str:
        # The answer's tokens begin where the prompt's end; the texts of them do too.
        return text(answer)[len(prompt) :]

    rewards = {"chosen_reward": pair.chosen_reward, "rejected_reward": pair.rejected_reward}
    return {
        "prompt": prompt,
        "chosen_response": response(pair.chosen),
        "rejected_response": response(pair.rejected),
        **{name: value for name, value in rewards.items() if value is not None},
    }
