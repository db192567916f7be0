"""What `recipes/preference.py` refuses, and prepares, before a model is loaded."""

from functools import partial
from typing import Any

from nemo_minitron.alignment.comparisons import encode_pairs
from nemo_minitron.alignment.prepared import Prepared
from nemo_minitron.config.align import PreferenceRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.bad_records import BadRecords, each_file
from nemo_minitron.data.chat.conversations import merged, read_preferences
from nemo_minitron.data.chat.encoded import EncodedSplit
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.align import check as checks


def check(r: PreferenceRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoint and render the pairs once.

    Raises:
        InputError: as `checks.prepare`; answers to be written; weights of the losses that are all 0; a
            pair without rewards.
    """
    if r.align.samples > 0:
        raise InputError(f"align.samples={r.align.samples}: must be 0, only recipes/sft.py writes answers")
    if r.align.replay:
        raise InputError(
            f"align.replay={r.align.replay}: must be 0, pairs of answers are not mixed with text"
        )
    d = r.align.dpo
    if not d.preference_loss_weight and not d.sft_loss_weight:
        raise InputError(
            "align.dpo.preference_loss_weight=0: and align.dpo.sft_loss_weight=0: one must not be 0"
        )
    own = ("preference_train", "preference_valid")
    return checks.prepare(r, partial(_encode, r), own_set=own, whole_batches=True)


def _encode(r: PreferenceRecipe, name: str, files: list[str], tokenizer: Any) -> EncodedSplit:
    bad = BadRecords(r.data.bad_records, f"align.{name}")
    return encode_pairs(
        merged(each_file(files, read_preferences, bad), r.align.merge_system),
        tokenizer,
        name=f"align.{name}",
        seq_length=r.data.seq_length,
        overlong=r.align.overlong,
        preference_loss=r.align.dpo.preference_loss,
        directory=cache_dir(r.data, "conversations"),
        bad_records=r.data.bad_records,
    )
