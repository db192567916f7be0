"""A corpus as Megatron-core's indexed dataset: tokenized once, built atomically, cached by content."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.data.beginning import AUTO, beginning
from nemo_minitron.data.corpus import SPLITS, Corpus, Document
from nemo_minitron.data.tokenizer import tokenizer_sha256
from nemo_minitron.errors import InputError
from nemo_minitron.files import file_sha256, put, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of the cache's key: raise it whenever the same corpus and tokenizer would give other files.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_BATCH_BYTES = 1 << 20
_PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True)
class IndexedCorpus:
    """The index files of a corpus and what is in them.

    Args:
        corpus: the corpus's name.
        train_prefix, valid_prefix: path prefixes; `.bin` and `.idx` files belong to each.
        documents, tokens, bytes: by split; tokens with those that each document begins and ends with, bytes of UTF-8.
        eod: the id that ends each document and is nowhere else.
        beginning: the ids that each document begins with, often none.
        vocab_size: the tokenizer's, before any padding for sharding.
        manifest_sha256, tokenizer_sha256: what it was made from.
        file_bytes, file_sha256: of each index file, by which half-written and damaged directories are told.
    """

    corpus: str
    train_prefix: str
    valid_prefix: str
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    eod: int
    beginning: list[int]
    vocab_size: int
    manifest_sha256: str
    tokenizer_sha256: str
    file_bytes: dict[str, int]
    file_sha256: dict[str, str]

    def prefix(self, split: str) -> str:
        """The path prefix of "train" or "valid"."""
        return {"train": self.train_prefix, "valid": self.valid_prefix}[split]

    @property
    def directory(self) -> Path:
        """Of the index files, their manifest and Megatron's order of samples."""
        return Path(self.train_prefix).parent

    def paths(self, split: str) -> list[str]:
        """The path prefix of a split, in the list that Megatron and NeMo take: of a blend it has weights too."""
        return [self.prefix(split)]

    def sequences(self, split: str, seq_length: int) -> int:
        """How many whole sequences and their last label a split has."""
        return (self.tokens[split] - 1) // seq_length

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text for a token."""
        return self.bytes[split] / self.tokens[split]

    def passes(self, split: str, tokens: int) -> dict[str, float]:
        """How often the corpus is read, by its name, where so many tokens are drawn."""
        return {f"data={self.corpus}": tokens / self.tokens[split]}

    def to_json(self, path: str | Path) -> None:
        """Write a manifest beside the index files; prefixes become relative to it: the directory can move."""
        fields = asdict(self)
        for split in SPLITS:
            fields[f"{split}_prefix"] = os.path.relpath(self.prefix(split), Path(path).parent)
        Path(path).write_text(json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "IndexedCorpus":
        """Read a manifest.

        Raises:
            InputError: no file, no manifest of this format, or index files missing or of another size.
        """
        try:
            fields = json.loads(read_text(path))
            version = fields.pop("format_version")
            for split in SPLITS:
                fields[f"{split}_prefix"] = os.path.normpath(Path(path).parent / fields[f"{split}_prefix"])
            indexed = cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: no manifest of an indexed corpus ({type(error).__name__}: {error})"
            ) from error
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version}, but this version reads {FORMAT_VERSION}")
        for name, size in indexed.file_bytes.items():
            file = Path(path).parent / name
            if not file.is_file() or file.stat().st_size != size:
                raise InputError(f"{file}: missing or half-written (expected {size} bytes)")
        return indexed

    def verify(self) -> None:
        """Compare every byte with the checksums, in under a second a gigabyte.

        Raises:
            InputError: a file is not what was written; names it.
        """
        for name, sha256 in self.file_sha256.items():
            file = Path(self.train_prefix).parent / name
            if file_sha256(file) != sha256:
                raise InputError(f"{file}: damaged (its sha256 is not that of the manifest)")


def build_indexed(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: str | Path,
    *,
    seq_length: int,
    bos: object = AUTO,
) -> IndexedCorpus:
    """Tokenize a corpus into Megatron-core's indexed format, or find it in the cache.

    Documents are stored one by one, each with `beginning` before and the end-of-document token after it, in the
    smallest integer type that holds the vocabulary; nothing is padded. Special tokens spelled out in a text are
    read as plain text. The files appear all at once, also when several processes build the same corpus; what a
    killed build left, or what no longer has its checksum, is redone.

    Args:
        corpus: what to read.
        tokenizer: a Hugging Face tokenizer with an eos token.
        cache_dir: a directory for this and other corpora.
        seq_length: tokens in one training sequence; each split must hold one sequence and its last label.
        bos: what documents begin with; see `data.beginning`.

    Raises:
        InputError: an empty split, one that is shorter than a sequence, or as `beginning`.
    """
    begin = beginning(tokenizer, bos)
    named = [FORMAT_VERSION, corpus.manifest_sha256, tokenizer_sha256(tokenizer), begin]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:24]
    final = Path(cache_dir) / f"{corpus.name}-{key}"
    # Before the lock, so that a finished corpus can be read where nothing may be written.
    indexed = _finished(final) or _build_once(corpus, tokenizer, begin, final)
    _check_length(indexed, seq_length)
    return indexed


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock between processes, which ends with the process that holds it, however it ends.

    Yields whether there is a lock: some network file systems have none.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            print(f"{path.parent}: no file locks here ({error.strerror})", file=sys.stderr)
            locked = False
        yield locked


def _finished(final: Path) -> IndexedCorpus | None:
    try:
        indexed = IndexedCorpus.from_json(final / MANIFEST)
        indexed.verify()
    except InputError as error:
        if final.exists():
            print(f"{error}; built again", file=sys.stderr, flush=True)
        return None
    return indexed


def _build_once(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", begin: list[int], final: Path
) -> IndexedCorpus:
    final.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(final.parent / f".{final.name}.lock") as locked:
        indexed = _finished(final)
        if indexed is None:
            # Under the lock these are what killed builds left; without it, someone may be writing one.
            for left_over in final.parent.glob(f".{final.name}.tmp-*") if locked else ():
                shutil.rmtree(left_over, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            _build(corpus, tokenizer, begin, final)
            indexed = IndexedCorpus.from_json(final / MANIFEST)
    return indexed


def _build(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", begin: list[int], final: Path) -> None:
    # Not tempfile.mkdtemp, which would close the directory to other users of a shared cache.
    temporary = final.parent / f".{final.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _write(corpus, tokenizer, begin, temporary)
        put(temporary, final)
    except OSError:
        # Without locks another process may have been first, and a directory replaces only an empty one.
        if _finished(final) is None:
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", begin: list[int], directory: Path) -> None:
    counts = {split: _write_split(corpus, split, tokenizer, begin, directory / split) for split in SPLITS}
    files = sorted(directory.iterdir())
    IndexedCorpus(
        corpus=corpus.name,
        train_prefix=str(directory / "train"),
        valid_prefix=str(directory / "valid"),
        documents={split: counts[split]["documents"] for split in SPLITS},
        tokens={split: counts[split]["tokens"] for split in SPLITS},
        bytes={split: counts[split]["bytes"] for split in SPLITS},
        eod=tokenizer.eos_token_id,
        beginning=begin,
        vocab_size=len(tokenizer),
        manifest_sha256=corpus.manifest_sha256,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        file_bytes={file.name: file.stat().st_size for file in files},
        file_sha256={file.name: file_sha256(file) for file in files},
    ).to_json(directory / MANIFEST)


def _write_split(
    corpus: Corpus, split: str, tokenizer: "PreTrainedTokenizerBase", begin: list[int], prefix: Path
) -> dict[str, int]:
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(len(tokenizer)))
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    told = time.monotonic()
    for batch in _batches(corpus.splits[split]):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            whole = [*begin, *ids, tokenizer.eos_token_id]
            builder.add_document(whole, [len(whole)])
            counts["documents"] += 1
            counts["tokens"] += len(whole)
            counts["bytes"] += len(document.text.encode())
        if time.monotonic() - told > _PROGRESS_EVERY_S:
            told = time.monotonic()
            print(
                f"tokenizing {corpus.name}/{split}: {counts['tokens']:,} tokens", file=sys.stderr, flush=True
            )
    if not counts["documents"]:
        raise InputError(
            f"data: the {split} split of corpus {corpus.name} is empty; it needs at least one document"
        )
    builder.finalize(get_idx_path(str(prefix)))
    return counts


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_length(indexed: IndexedCorpus, seq_length: int) -> None:
    for split in SPLITS:
        if indexed.tokens[split] < seq_length + 1:
            raise InputError(
                f"data: the {split} split of corpus {indexed.corpus} has {indexed.tokens[split]} tokens, but "
                f"one sequence needs {seq_length + 1} (seq_length {seq_length} and the last label); "
                f"give more text or a shorter seq_length"
            )
