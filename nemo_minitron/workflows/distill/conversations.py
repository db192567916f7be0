"""The conversations that a distillation learns from: what is refused of them, and what is made of them once."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.recipes import ConversationsConfig, DataConfig, cache_dir
from nemo_minitron.data.bad_records import BadRecords, each_file
from nemo_minitron.data.chat.conversations import merged
from nemo_minitron.data.chat.encoded import EncodedSplit, encode_split
from nemo_minitron.data.chat.formats import convert_file
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.conversations import files_of, prepared_tokenizer

_GROUP = "distill.conversations"


def check_conversations(c: ConversationsConfig) -> None:
    """Refuse files that would not be read.

    Raises:
        InputError: names the setting.
    """
    for name in ("train", "valid", "chat_template"):
        if not c.weight and getattr(c, name) is not None:
            raise InputError(
                f"{_GROUP}.{name}={getattr(c, name)}: would not be read with {_GROUP}.weight=0.0; choose "
                "distill=instruct or instruct_mixed, or a weight up to 1"
            )


def prepare_conversations(
    c: ConversationsConfig,
    model: Source,
    d: DataConfig,
    data: PreparedData,
    ready: Mapping[str, Any] | None = None,
) -> Conversations | None:
    """Encode both splits with the model's chat template, once; None where none are learned from.

    Args:
        model: the student, or a teacher whose states are cached.
        data: the corpus, prepared.
        ready: of `Conversations.to_config`.

    Raises:
        InputError: as `prepared_tokenizer`, `files_of` and `encode_split`.
    """
    if not c.weight:
        return None
    if ready:
        return Conversations.from_config(dict(ready))
    directory = prepared_tokenizer(c.chat_template, model, d, f"{_GROUP}.chat_template")
    tokenizer = load_tokenizer(str(directory))
    files = files_of({name: getattr(c, name) for name in ("train", "valid")}, ("train", "valid"), d, _GROUP)
    valid, train = (_encoded(name, files[name], c, d, tokenizer) for name in ("valid", "train"))
    return Conversations(train, valid, c.weight, c.packed, data.indexed.eod, str(directory))


def _encoded(
    name: str, files: list[str], c: ConversationsConfig, d: DataConfig, tokenizer: Any
) -> EncodedSplit:
    bad = BadRecords(d.bad_records, f"{_GROUP}.{name}")
    samples = each_file(files, lambda file, bad: convert_file(file, bad=bad), bad)
    return encode_split(
        merged(samples, c.merge_system),
        tokenizer,
        name=f"{_GROUP}.{name}",
        seq_length=d.seq_length,
        overlong=c.overlong,
        directory=cache_dir(d, "conversations"),
        bad_records=d.bad_records,
    )
