"""Conversations as files of tokens and loss masks: encoded once, before ranks start."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.data.bad_records import REFUSE
from nemo_minitron.data.chat.conversations import Conversation
from nemo_minitron.data.chat.encoding import Encoded
from nemo_minitron.data.chat.fitting import Fitted, fit_conversations
from nemo_minitron.errors import InputError
from nemo_minitron.files import put

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("nemo_minitron")
_FORMAT = 1


@dataclass(frozen=True)
class EncodedSplit:
    """A split as token ids in a JSONL file, and what became of its conversations or pairs.

    `samples`: in the file; `dropped` and `cut`: those that were longer than the context; `refused`: those that cannot
    be trained on with the chat template; `tokens`: of the samples in the file; `answer_tokens`: those of them that the
    loss is taken on; `replayed`: samples that are text, of which every token is.
    """

    path: str
    samples: int
    dropped: int
    cut: int
    refused: int
    tokens: int
    answer_tokens: int
    replayed: int = 0

    def to_config(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def encode_split(
    conversations: Iterable[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    seq_length: int,
    overlong: str,
    directory: Path,
    bad_records: str = REFUSE,
) -> EncodedSplit:
    """Write the tokens of each conversation's samples into a file that is named by its content.

    Args:
        tokenizer: with its chat template.
        name: the setting that names the files, such as "align.train", for the log and refusals.
        seq_length: the context in tokens.
        overlong: what is done with samples that are longer: "refuse", "drop" or "cut".
        directory: where the file goes.
        bad_records: what is done with those that cannot be trained on: "refuse" or "skip".

    Raises:
        InputError: as `fit_conversations`.
    """
    with fitting(name):
        kept, fitted = fit_conversations(tokenizer, conversations, seq_length, overlong, bad_records)
    encoded = [sample for fit in kept for sample in fit.encoded]
    path = write_rows((_line(sample) for sample in encoded), directory)
    return described(path, len(encoded), encoded, fitted, name, seq_length)


def with_text(split: EncodedSplit, sequences: Sequence[Sequence[int]], directory: Path) -> EncodedSplit:
    """The split with sequences of text behind its samples, all of whose tokens but the first are learned."""
    texts = [Encoded(list(tokens), [0] + [1] * (len(tokens) - 1)) for tokens in sequences]
    with open(split.path) as file:
        rows = [json.loads(line) for line in file]
    return replace(
        split,
        path=str(write_rows([*rows, *map(_line, texts)], directory)),
        samples=split.samples + len(texts),
        tokens=split.tokens + sum(len(text.tokens) for text in texts),
        answer_tokens=split.answer_tokens + sum(sum(text.loss_mask) for text in texts),
        replayed=len(texts),
    )


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Let refusals begin with the setting that names the files."""
    try:
        yield
    except InputError as error:
        told = str(error).replace("overlong=", f"{name.rpartition('.')[0]}.overlong=")
        raise InputError(f"{name}: {told}") from None


def described(
    path: Path, samples: int, encoded: Sequence[Encoded], fitted: Fitted, name: str, seq_length: int
) -> EncodedSplit:
    """What a written file holds, which is also logged."""
    logger.info("%s: %s", name, fitted.line(seq_length))
    return EncodedSplit(
        str(path),
        samples=samples,
        dropped=fitted.dropped,
        cut=fitted.cut,
        refused=fitted.refused,
        tokens=sum(len(sample.tokens) for sample in encoded),
        answer_tokens=sum(sum(sample.loss_mask) for sample in encoded),
    )


def _line(sample: Encoded) -> dict[str, Any]:
    return {"tokens": sample.tokens, "loss_mask": sample.loss_mask}


def write_rows(rows: Iterable[dict[str, Any]], directory: Path) -> Path:
    """Write one object a line into a file that is named by its content; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary, digest = directory / f".{os.getpid()}.tmp", hashlib.sha256()
    with open(temporary, "w") as file:
        for row in rows:
            line = json.dumps(row) + "\n"
            digest.update(line.encode())
            file.write(line)
    path = directory / f"{digest.hexdigest()[:24]}-{_FORMAT}.jsonl"
    put(temporary, path)
    return path
