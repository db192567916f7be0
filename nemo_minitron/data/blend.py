"""A blend: several indexed corpora, of which Megatron's own blending draws sequences in proportion to weights."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_minitron.config.data import DataConfig
from nemo_minitron.data.corpora import check_keys, files_of, load_corpus
from nemo_minitron.data.corpus import SPLITS, Corpus, Document, Stream
from nemo_minitron.data.held_out import refuse_shared
from nemo_minitron.data.indexed import MANIFEST, IndexedCorpus
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, write_text

BLEND = "blend"
_FORMAT_VERSION = 1
# Of GPTDatasetConfig: how much more is built of each part than its weight asks for.
_SURPLUS = 0.005
# The settings of a part in a refusal, not the names of files.
_OWN_KEY = re.compile(
    r"(?<![\w/.-])data(: |\.(?:name|train|valid|text_key|valid_fraction|path|config|revision|(?:train|valid)_split)\b)"
)


@dataclass(frozen=True)
class IndexedBlend:
    """The index files of several corpora, and how much of each is read.

    Attributes:
        parts: as `corpus` names them.
        weights: of the parts, positive, together 1.
        directory: of this blend's manifest and of Megatron's order of samples.
    """

    parts: tuple[IndexedCorpus, ...]
    weights: tuple[float, ...]
    directory: Path
    corpus: str = BLEND

    @property
    def eod(self) -> int:
        """The id that ends each document."""
        return self.parts[0].eod

    @property
    def beginning(self) -> list[int]:
        """The ids that each document begins with."""
        return self.parts[0].beginning

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.parts[0].vocab_size

    @property
    def manifest_sha256(self) -> str:
        """Hex sha256 of what the parts were made from and of their weights."""
        named = [[part.manifest_sha256, w] for part, w in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    @property
    def tokens(self) -> dict[str, int]:
        """Of all parts, by split."""
        return {split: sum(part.tokens[split] for part in self.parts) for split in SPLITS}

    def paths(self, split: str) -> list[str]:
        """Weights and path prefixes in turn, as Megatron and NeMo take them."""
        pairs = zip(self.weights, self.parts, strict=True)
        return [text for weight, part in pairs for text in (str(weight), part.prefix(split))]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text for a token of the blend."""
        pairs = zip(self.weights, self.parts, strict=True)
        return sum(weight * part.bytes_per_token(split) for weight, part in pairs)

    def sequences(self, split: str, seq_length: int) -> int:
        """How many can be drawn without reading any part twice; see `one_pass`."""
        return one_pass([part.sequences(split, seq_length) for part in self.parts], self.weights)

    def passes(self, split: str, tokens: int) -> dict[str, float]:
        """How often each part is read, by its place in the blend, where so many tokens are drawn."""
        pairs = enumerate(zip(self.weights, self.parts, strict=True))
        return {f"data.blend[{n}]": weight * tokens / part.tokens[split] for n, (weight, part) in pairs}

    @classmethod
    def of(
        cls, parts: Sequence[IndexedCorpus], weights: Sequence[float], cache_dir: str | Path
    ) -> "IndexedBlend":
        """A blend with a directory of its own in the cache, and its manifest there."""
        named = [[part.directory.name, weight] for part, weight in zip(parts, weights, strict=True)]
        key = hashlib.sha256(json.dumps([_FORMAT_VERSION, named]).encode()).hexdigest()[:24]
        blend = cls(tuple(parts), tuple(weights), Path(cache_dir) / f"{BLEND}-{key}")
        if not (blend.directory / MANIFEST).is_file():
            blend.to_json()
        return blend

    def to_json(self) -> Path:
        """Write the manifest that `from_json` reads, with paths relative to it; returns its path."""
        path = self.directory / MANIFEST
        manifests = [os.path.relpath(part.directory / MANIFEST, self.directory) for part in self.parts]
        fields = {"format_version": _FORMAT_VERSION, "weights": list(self.weights), "parts": manifests}
        return write_text(path, json.dumps({BLEND: fields}, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "IndexedBlend":
        """Read a manifest.

        Raises:
            InputError: no manifest of this format, or as `IndexedCorpus.from_json` of a part.
        """
        try:
            fields = json.loads(read_text(path))[BLEND]
            parts = [os.path.normpath(Path(path).parent / part) for part in fields["parts"]]
            weights = tuple(map(float, fields["weights"]))
            version = fields["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no manifest of a blend ({type(error).__name__}: {error})") from error
        if version != _FORMAT_VERSION or len(parts) != len(weights):
            raise InputError(f"{path}: no manifest of a blend of format version {_FORMAT_VERSION}")
        return cls(tuple(map(IndexedCorpus.from_json, parts)), weights, Path(path).parent)


def one_pass(lengths: Sequence[int], weights: Sequence[float]) -> int:
    """The most sequences of a blend for which Megatron reads no part twice; at least 1.

    Args:
        lengths: sequences of each part.
        weights: of each part, together 1.

    Source: `_get_size_per_split_per_dataset` in megatron/core/datasets/blended_megatron_dataset_builder.py@0.13.1.
    """

    def fits(size: int) -> bool:
        targets = [math.ceil(size * weight) for weight in weights]
        drawn = [math.floor(sum(targets) * weight) + 1 for weight in weights]
        built = [math.ceil(target * (1 + _SURPLUS)) for target in targets]
        return all(max(d, b) <= length for d, b, length in zip(drawn, built, lengths, strict=True))

    size = min(int(length / weight) for length, weight in zip(lengths, weights, strict=True))
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return max(low, 1)


@dataclass(frozen=True)
class Part:
    """What is read of one entry of `data.blend`. `key`: "data.blend[0]"; `weight`: together 1."""

    key: str
    weight: float
    settings: dict[str, Any]

    def corpus(self) -> Corpus:
        """Open it.

        Raises:
            InputError: as `load_corpus`, with the part's key.
        """
        with of_part(self.key):
            return load_corpus(self.settings)


def parts_of(d: DataConfig) -> list[Part]:
    """The parts of `data.blend` that are read: those whose weight is not 0.

    Raises:
        InputError: none; weights that do not add up to something positive; keys of a single corpus beside them; a
            held-out file of one part that another trains on.
    """
    check_keys(BLEND, vars(d))
    if not d.blend:
        raise InputError(
            "data.blend is missing: data=blend needs a list of corpora, such as "
            "data.blend=[{weight: 7, train: a/*.jsonl}, {weight: 3, name: stdlib}]"
        )
    total = sum(part.weight for part in d.blend)
    if not total > 0 or not math.isfinite(total):
        raise InputError(
            f"data.blend: the weights {', '.join(f'{part.weight:g}' for part in d.blend)} add up to {total:g}; one at "
            "least must be positive"
        )
    parts = [
        Part(key, part.weight / total, {**vars(part), "bad_records": d.bad_records, "where": key})
        for key, part in ((f"data.blend[{number}]", part) for number, part in enumerate(d.blend))
        if part.weight
    ]
    _refuse_shared(parts)
    return parts


def _refuse_shared(parts: Sequence[Part]) -> None:
    """Each part by itself is looked at where it is opened."""
    files = {}
    for part in parts:
        with of_part(part.key):
            files[part.key] = files_of(part.settings)
    for (one, (train, _)), (other, (_, valid)) in itertools.permutations(files.items(), 2):
        refuse_shared(train, valid, f"{one}.train", f"{other}.valid")


@contextmanager
def of_part(key: str) -> Iterator[None]:
    """Within it, a refusal names the part's settings, not those of `data`."""
    try:
        yield
    except InputError as error:
        raise InputError(_OWN_KEY.sub(rf"{key}\1", str(error))) from None


def blended_corpus(d: DataConfig) -> Corpus:
    """All documents of all parts, each once, for what is not read in proportion: a tokenizer, a compressor.

    Raises:
        InputError: as `parts_of` and `Part.corpus`.
    """
    corpora = {part.key: part.corpus() for part in parts_of(d)}

    def documents(split: str) -> Iterator[Document]:
        for key, corpus in corpora.items():
            for document in corpus.splits[split]:
                yield Document(f"{key}/{document.path}", document.text)

    return Corpus(BLEND, {split: Stream(partial(documents, split)) for split in SPLITS})
