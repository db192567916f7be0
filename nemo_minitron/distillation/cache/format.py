"""A teacher's states on disk: what the files are called, what the manifest says, what a token costs.

A cache is a directory of `shard-NNNNNN.safetensors`, each with whole training sequences, `head.safetensors` with the
teacher's output layer (form "hidden") and `manifest.json`, which is written last. Tensors of a shard with n sequences:

    digests          [n, 16] uint8                    names each sequence by its tokens (`digest`)
    hidden           [n, s, h] float32 or bfloat16    form "hidden": what enters the teacher's output layer
    values           [n, s, k] float32 or float16     form "top_k": its k largest logits minus the largest, descending
    indices          [n, s, k] int32                  their tokens
    tail_logsumexp   [n, s] float32                   log-sum-exp of the other (logits - largest) / T

A sequence is found by its tokens alone, so neither the order of the samples nor layout and batch sizes matter.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text

FORMAT_VERSION = 1
FORMS = ("hidden", "top_k")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANIFEST, HEAD = "manifest.json", "head.safetensors"
DIGEST_BYTES = 16
_SHARD = re.compile(r"shard-\d{6,}\.safetensors")


def digest(tokens: Tensor) -> list[bytes]:
    """The names of sequences: 128-bit BLAKE2b of each row's token ids [n, s] as little-endian int32."""
    rows = np.ascontiguousarray(tokens.detach().cpu().numpy().astype("<i4"))
    return [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest() for row in rows]


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:06d}.safetensors"


@dataclass(frozen=True)
class Contents:
    """What a cache holds, whoever writes it under whatever layout.

    Attributes:
        form: "hidden" or "top_k".
        dtype: of the teacher: "float32" or "bfloat16".
        teacher: where it was, for people to read.
        teacher_sha256: identities of its weights, one for each form of the checkpoint (Hugging Face, NeMo 2).
        hidden_size: h of the teacher.
        vocab_size: rows of its output layer, padding included.
        vocabulary_sha256: of its tokenizer's entries.
        data, data_sha256: the corpus.
        data_seed: of the samples' order.
        seq_length: s, tokens in a sequence.
        samples: sequences by split.
        top_k, temperature: k, and T of the tail; None in form "hidden".
        beginning: the ids that each document begins with.
    """

    form: str
    dtype: str
    teacher: str
    teacher_sha256: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    vocabulary_sha256: str
    data: str
    data_sha256: str
    data_seed: int
    seq_length: int
    samples: dict[str, int]
    top_k: int | None = None
    temperature: float | None = None
    beginning: tuple[int, ...] = ()

    @property
    def sequences(self) -> int:
        """Of all splits together."""
        return sum(self.samples.values())

    @property
    def bytes_per_token(self) -> int:
        """Without the digests, which are 16 bytes a sequence."""
        itemsize = DTYPES[self.dtype].itemsize
        if self.form == "hidden":
            return self.hidden_size * itemsize
        assert self.top_k is not None
        return self.top_k * (itemsize + 4) + 4

    @property
    def bytes_per_sequence(self) -> int:
        """In a shard."""
        return self.seq_length * self.bytes_per_token + DIGEST_BYTES

    @property
    def head_bytes(self) -> int:
        """Of the output layer, which form "hidden" keeps."""
        return (
            self.hidden_size * self.vocab_size * DTYPES[self.dtype].itemsize if self.form == "hidden" else 0
        )

    @property
    def bytes(self) -> int:
        """Of the whole cache but for headers and the manifest."""
        return self.sequences * self.bytes_per_sequence + self.head_bytes

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape but for the number of sequences, and dtype of each tensor of a shard."""
        s, k = self.seq_length, self.top_k or 0
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"digests": ((DIGEST_BYTES,), torch.uint8)}
        if self.form == "hidden":
            return found | {"hidden": ((s, self.hidden_size), DTYPES[self.dtype])}
        values = torch.float32 if self.dtype == "float32" else torch.float16
        return found | {
            "values": ((s, k), values),
            "indices": ((s, k), torch.int32),
            "tail_logsumexp": ((s,), torch.float32),
        }


@dataclass(frozen=True)
class File:
    """A file of the cache; `sequences` is 0 for the output layer."""

    name: str
    bytes: int
    sha256: str
    sequences: int = 0


@dataclass(frozen=True)
class Manifest:
    """`lm_loss_nats`: the teacher's own, on held-out text, measured when the cache was written."""

    contents: Contents
    lm_loss_nats: float
    shards: tuple[File, ...]
    head: File | None = None
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> str:
        """For `MANIFEST`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def read_contents(fields: Any) -> Contents:
    """`Contents` of what a JSON file says, every value checked.

    Raises:
        ValueError, KeyError, TypeError: no such thing.
    """
    fields = dict(fields)
    sizes = ("hidden_size", "vocab_size", "seq_length")
    counts = [*(fields[name] for name in sizes), *fields["samples"].values()]
    texts = [fields[name] for name in ("teacher", "vocabulary_sha256", "data", "data_sha256")]
    _expect(fields["form"] in FORMS and fields["dtype"] in DTYPES, "form or dtype")
    _expect(all(_is_count(n) for n in counts) and set(fields["samples"]) == {"train", "valid"}, "sizes")
    texts += fields["teacher_sha256"]
    _expect(
        all(isinstance(t, str) and len(t.splitlines()) < 2 for t in texts), "names"
    )  # messages are one line
    _expect(type(fields["data_seed"]) is int, "data_seed")
    k, temperature = fields["top_k"], fields["temperature"]
    if fields["form"] == "hidden":
        _expect(k is None and temperature is None, "top_k or temperature")
    else:
        _expect(_is_count(k) and 0 < k <= fields["vocab_size"], "top_k")
        _expect(type(temperature) is float and 0 < temperature < float("inf"), "temperature")
    begin = fields.get("beginning", ())
    _expect(all(_is_count(n) for n in begin), "beginning")
    return Contents(**fields | {"teacher_sha256": tuple(fields["teacher_sha256"]), "beginning": tuple(begin)})


def read_file(fields: Any) -> File:
    """A `File` of what a JSON file says; names are those that this package gives, so that none leads elsewhere.

    Raises:
        ValueError, KeyError, TypeError: no such thing.
    """
    found = File(**fields)
    _expect(isinstance(found.name, str) and isinstance(found.sha256, str), "file")
    _expect(found.name == HEAD or _SHARD.fullmatch(found.name), f"file name {found.name!r}")
    _expect(_is_count(found.bytes) and _is_count(found.sequences), "file size")
    return found


def read_manifest(path: Path, where: str) -> Manifest:
    """The manifest of a finished cache.

    Args:
        where: how a refusal begins.

    Raises:
        InputError: it cannot be read, or is of another version.
    """
    try:
        fields = json.loads(read_text(path))
        version = fields["format_version"]
        if version == FORMAT_VERSION:
            contents, head = read_contents(fields["contents"]), fields["head"]
            shards = tuple(read_file(shard) for shard in fields["shards"])
            loss = fields["lm_loss_nats"]
            _expect(type(loss) is float, "lm_loss_nats")
            _expect(sum(shard.sequences for shard in shards) == contents.sequences, "sequences")
            _expect((head is None) == (contents.form != "hidden"), "head")
            return Manifest(contents, loss, shards, None if head is None else read_file(head))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{where}: {MANIFEST} is no manifest of a teacher's cache ({type(error).__name__}: {error})"
        ) from None
    raise InputError(
        f"{where}: {MANIFEST} has format version {version!r}, this version reads {FORMAT_VERSION}"
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expect(good: Any, what: str) -> None:
    if not good:
        raise ValueError(what)


def shards_of(sequences: int, per_shard: int) -> list[range]:
    """Which sequences, by number, each shard holds."""
    return [range(begin, min(begin + per_shard, sequences)) for begin in range(0, sequences, per_shard)]
