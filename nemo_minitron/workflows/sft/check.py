"""What `recipes/sft.py` refuses, and prepares, before a model is loaded."""

from functools import partial
from typing import Any

from nemo_minitron.alignment.prepared import Prepared
from nemo_minitron.config.align import SftRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.bad_records import BadRecords, each_file
from nemo_minitron.data.chat.conversations import merged
from nemo_minitron.data.chat.encoded import EncodedSplit, encode_split
from nemo_minitron.data.chat.formats import convert_file
from nemo_minitron.workflows.align import check as checks


def check(r: SftRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoint and encode the conversations once.

    Raises:
        InputError: as `checks.prepare`; a conversation that cannot be trained on, by file and line.
    """
    return checks.prepare(r, partial(_encode, r), own_set=("train", "valid"), whole_batches=False)


def _encode(r: SftRecipe, name: str, files: list[str], tokenizer: Any) -> EncodedSplit:
    bad = BadRecords(r.data.bad_records, f"align.{name}")
    samples = each_file(files, lambda file, bad: convert_file(file, bad=bad), bad)
    return encode_split(
        merged(samples, r.align.merge_system),
        tokenizer,
        name=f"align.{name}",
        seq_length=r.data.seq_length,
        overlong=r.align.overlong,
        directory=cache_dir(r.data, "conversations"),
        bad_records=r.data.bad_records,
    )
