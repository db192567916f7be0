"""From a `DataConfig` to index files and a tokenizer directory, each made once and cached."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config.document_limits import check_ends
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.data.blend import BLEND, IndexedBlend, blended_corpus, of_part, parts_of
from nemo_minitron.data.corpora import check_keys, load_corpus
from nemo_minitron.data.corpus import Corpus
from nemo_minitron.data.indexed import MANIFEST, IndexedCorpus, build_indexed, exclusive
from nemo_minitron.data.tokenizer import load_tokenizer, train_bpe
from nemo_minitron.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """An indexed corpus, or a blend of some, and the tokenizer it was indexed with.

    `tokenizer_dir`: a Hugging Face directory or hub id.
    """

    indexed: IndexedCorpus | IndexedBlend
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_dir: str

    def to_config(self) -> dict[str, str]:
        """Where it lies, for ranks that start later and need not open the corpus again."""
        manifest = self.indexed.directory / MANIFEST
        return {"indexed": str(manifest), "tokenizer": str(self.tokenizer_dir)}

    @property
    def index_cache(self) -> Path:
        """Where Megatron keeps the shuffled order of samples."""
        return self.indexed.directory / "order"


def prepare_data(
    data: DataConfig, tokenizer: str | None = None, ready: Mapping[str, str] | None = None
) -> PreparedData:
    """Open the corpus, find or train the tokenizer, build or find the index.

    Args:
        tokenizer: the checkpoint's own, used where the configuration names none; with neither, a BPE is trained.
        ready: of `PreparedData.to_config`: what the launcher prepared for its ranks; the corpus stays closed then.

    Raises:
        InputError: as `load_corpus`, `train_bpe`, `build_indexed` and `check_ends`.
    """
    if ready:
        found = read_indexed(ready["indexed"])
        return PreparedData(found, load_tokenizer(ready["tokenizer"]), ready["tokenizer"])
    directory = data.tokenizer or tokenizer or _trained(open_corpus(data), data)
    loaded = load_tokenizer(directory)
    indexed = (
        _indexed_blend(data, loaded) if data.name == BLEND else _indexed(open_corpus(data), data, loaded)
    )
    check_ends(data, indexed.beginning, indexed.eod)
    return PreparedData(indexed, loaded, directory)


def read_indexed(manifest: str | Path) -> IndexedCorpus | IndexedBlend:
    """What a manifest names: a corpus, or a blend, which has a directory of its own.

    Raises:
        InputError: as `from_json` of either.
    """
    blend = Path(manifest).parent.name.startswith(f"{BLEND}-")
    return IndexedBlend.from_json(manifest) if blend else IndexedCorpus.from_json(manifest)


def _indexed(corpus: Corpus, d: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> IndexedCorpus:
    return build_indexed(corpus, tokenizer, cache_dir(d, "data"), seq_length=d.seq_length, bos=d.bos)


def _indexed_blend(d: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> IndexedBlend:
    """Each part is indexed by itself, and shared with whoever reads it alone or with other weights."""
    parts, weights = [], []
    for part in parts_of(d):
        with of_part(part.key):
            parts.append(_indexed(part.corpus(), d, tokenizer))
        weights.append(part.weight)
    return IndexedBlend.of(parts, weights, cache_dir(d, "data"))


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that the configuration names; of a blend all documents.

    Raises:
        InputError: as `load_corpus` and `blended_corpus`.
    """
    if data.name == BLEND:
        return blended_corpus(data)
    check_keys(data.name, vars(data))
    return load_corpus({k: v for k, v in vars(data).items() if v is not None})


def _trained(corpus: Corpus, data: DataConfig) -> str:
    key = json.dumps(["bpe", 1, corpus.manifest_sha256, data.vocab_size])
    final = cache_dir(data, "tokenizers") / hashlib.sha256(key.encode()).hexdigest()[:24]
    final.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(final.with_name(f".{final.name}.lock")):
        if not final.is_dir():
            with replacing(final) as temporary:
                train_bpe((d.text for d in corpus.splits["train"]), data.vocab_size, temporary)
    return str(final)
