"""What `recipes/instruct_data.py` refuses, and prepares, before a model is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.instruct import InstructDataConfig, InstructDataRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.bad_records import BadRecords, each_file
from nemo_minitron.data.chat.conversations import Conversation, Preference, read_preferences
from nemo_minitron.data.chat.fitting import Fitted, fit_conversations, fit_preferences
from nemo_minitron.data.chat.formats import convert_file
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.instruct.generate import InstructFiles, cached_instruct_set, prompt_key
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.workflows.one_process import OneProcess, check_one_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_Samples = Sequence[Conversation] | Sequence[Preference]


@dataclass(frozen=True)
class Prepared(OneProcess):
    """What is to be written: samples of a converted file by split, or the project's own set, which is in the cache."""

    samples: dict[str, _Samples]
    fitted: Fitted | None
    generated: InstructFiles | None = None


def check(r: InstructDataRecipe) -> Prepared:
    """Read and check everything before anything is written.

    Raises:
        InputError: an invalid setting, or a line that cannot be trained on; names file and line.
    """
    d = r.instruct_data
    check_one_process(r.trainer, "instruct_data")
    _check_settings(d)
    if d.input is None:
        return Prepared({}, None, cached_instruct_set(cache_dir(r.data, "instruct"), r.seed, d.sizes))
    samples: _Samples
    bad = BadRecords(r.data.bad_records, "instruct_data.input")
    with of_setting("instruct_data.input"):
        if d.kind == "preferences":
            samples = list(each_file([d.input], read_preferences, bad))
        else:
            samples = list(each_file([d.input], lambda file, bad: convert_file(file, d.format, bad), bad))
    fitted = None
    if d.tokenizer is not None:
        samples, fitted = _fit(
            samples, with_template(load_tokenizer(d.tokenizer), d.tokenizer), d, r.data.bad_records
        )
    return Prepared(_split(samples, d.valid_fraction), fitted)


def _check_settings(d: InstructDataConfig) -> None:
    if d.max_tokens is not None and d.tokenizer is None:
        raise InputError(
            f"instruct_data.max_tokens={d.max_tokens}: needs instruct_data.tokenizer to count with"
        )
    if d.input is None and (d.max_tokens, d.tokenizer, d.valid_fraction) != (None, None, 0):
        raise InputError(
            "instruct_data.input is missing: tokenizer, max_tokens and valid_fraction are for a file of others; the "
            "project's own set has splits and short samples"
        )


def _fit(
    samples: _Samples, tokenizer: "PreTrainedTokenizerBase", d: InstructDataConfig, bad_records: str
) -> tuple[_Samples, Fitted]:
    limit = d.max_tokens if d.max_tokens is not None else 2**62
    if d.kind == "preferences":
        pairs, fitted = fit_preferences(tokenizer, samples, limit, d.overlong, bad_records)  # type: ignore[arg-type]
        return [fit.sample for fit in pairs], fitted
    kept, fitted = fit_conversations(tokenizer, samples, limit, d.overlong, bad_records)  # type: ignore[arg-type]
    return [fit.sample for fit in kept], fitted


def _split(samples: _Samples, valid_fraction: float) -> dict[str, Any]:
    """By the prompt's hash: the same prompt is always on the same side, in whatever file it comes."""
    train: list[Any] = []
    valid: list[Any] = []
    for sample in samples:
        prompt = [m for m in sample.messages if m["role"] != "assistant"]
        digest = hashlib.sha256(prompt_key(prompt).encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < valid_fraction * 2**64
        (valid if held_out else train).append(sample)
    if not train or (valid_fraction and not valid):
        raise InputError(
            f"instruct_data.valid_fraction={valid_fraction}: of {len(samples)} samples {len(valid)} are held out and "
            f"{len(train)} are left; both must be at least 1"
        )
    return {"train": train, **({"valid": valid} if valid else {})}
