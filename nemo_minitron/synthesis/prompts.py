"""What the teacher starts from: prompts of a file, or the openings of a corpus, as token ids."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.data.beginning import AUTO, beginning
from nemo_minitron.data.records import Record, kind_of, read_records, read_text_lines
from nemo_minitron.errors import InputError
from nemo_minitron.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.data.indexed import IndexedCorpus  # imports Megatron; checks are light


@dataclass(frozen=True)
class Prompts:
    """Token ids of every prompt, where each came from, and a hash over all ids."""

    tokens: list[list[int]]
    places: list[str]

    @property
    def sha256(self) -> str:
        """Hex sha256 of the token ids."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()

    def check_room(self, max_new_tokens: int, context: int) -> None:
        """Refuse what does not fit the teacher's context.

        Args:
            max_new_tokens: written after each prompt.
            context: of the teacher, in tokens.

        Raises:
            InputError: names the first prompt that is too long.
        """
        for tokens, place in zip(self.tokens, self.places, strict=True):
            if len(tokens) + max_new_tokens > context:
                raise InputError(
                    f"{place}: a prompt of {len(tokens)} tokens and synthesize.max_new_tokens={max_new_tokens} are "
                    f"more than the teacher's context of {context}"
                )


def read_prompts(path: str, key: str, tokenizer: "PreTrainedTokenizerBase", *, bos: object = AUTO) -> Prompts:
    """Prompts of a text file, one a line, or of a file of records (`data.records`); blank lines are passed over.

    Each begins as a document does, or, where documents begin with nothing, with the end of another.

    Args:
        path: of the file, UTF-8.
        key: of the prompt in a JSON object.
        bos: see `data.beginning`.

    Raises:
        InputError: no such file, none in it, or a bad line: names the file and the line.
    """
    texts = list(_texts(path, key))
    begin = beginning(tokenizer, bos) or [tokenizer.eos_token_id]
    tokens, places = [], []
    for place, text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)  # type: ignore[call-arg]
        tokens.append([*begin, *ids])
        places.append(place)
    if not tokens:
        raise InputError(f"synthesize.prompts={path}: holds no prompt")
    return Prompts(tokens, places)


def _texts(path: str, key: str) -> Iterator[tuple[str, str]]:
    file = user_path(path)
    try:
        if kind_of(file) == "text":
            for number, line in read_text_lines(file):
                yield f"synthesize.prompts={path}, line {number}", line
            return
        for record in read_records(file, (key,)):
            if isinstance(record.value, InputError):
                raise record.value
            yield f"synthesize.prompts={record.where}", _text_of(record, key)
    except InputError as error:
        raise InputError(f"synthesize.prompts={error}".replace(str(file), path)) from None


def _text_of(record: Record, key: str) -> str:
    text = record.value.get(key)
    if not isinstance(text, str):
        raise InputError(
            f"{record.where}: must be a JSON object whose '{key}' is a string (synthesize.prompt_key)"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{record.where}: '{key}' holds an unpaired surrogate escape, which is no Unicode text"
        ) from None
    return text


def openings(
    indexed: "IndexedCorpus",
    *,
    of: str,
    length: int,
    seq_length: int,
    samples: int,
    seed: int,
) -> Prompts:
    """The first `length` tokens of up to `samples` of the train split's documents or packed sequences.

    An opening has `length` tokens of the document's text, after what documents begin with or, where that is nothing,
    after the end of another. Documents of no more text are passed over: they would be copied and not gone on with.
    Sequences are the pieces of `seq_length` tokens that packed text is cut into.

    Args:
        indexed: the corpus.
        of: "documents" or "sequences".
        seed: of the choice and the order.

    Raises:
        InputError: every document is too short, or a sequence is.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(indexed.train_prefix)
    if of == "documents":
        starts = data.index.sequence_pointers // data.index.dtype_size
        own = len(indexed.beginning)
        # Beginning and end-of-document token count among the lengths.
        found = [int(i) for i in np.flatnonzero(data.index.sequence_lengths > own + length + 1)]
        begin, offsets, where = indexed.beginning or [indexed.eod], starts + own, "document"
    else:
        found = list(range(indexed.tokens["train"] // seq_length)) if length <= seq_length else []
        offsets = np.arange(len(found)) * seq_length
        begin, where = [], "sequence"
    if not found:
        raise InputError(
            f"synthesize.opening_tokens={length}: no train {where} is longer; give a smaller number or other data"
        )
    random.Random(seed).shuffle(found)
    chosen = found[:samples]
    tokens = np.memmap(f"{indexed.train_prefix}.bin", dtype=data.index.dtype, mode="r")
    prompts = [[*begin, *map(int, tokens[offsets[i] : offsets[i] + length])] for i in chosen]
    return Prompts(prompts, [f"synthesize.opening_tokens={length}, train {where} {i}" for i in chosen])
