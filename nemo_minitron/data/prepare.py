"""From a `DataConfig` to index files and a tokenizer directory, each made once and cached."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config.document_limits import check_ends
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.data.corpora import load_corpus
from nemo_minitron.data.corpus import Corpus
from nemo_minitron.data.indexed import MANIFEST, IndexedCorpus, build_indexed, exclusive
from nemo_minitron.data.tokenizer import load_tokenizer, train_bpe
from nemo_minitron.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """An indexed corpus and the tokenizer it was indexed with. `tokenizer_dir`: a Hugging Face directory or hub id."""

    indexed: IndexedCorpus
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_dir: str

    def to_config(self) -> dict[str, str]:
        """Where it lies, for ranks that start later and need not open the corpus again."""
        manifest = Path(self.indexed.train_prefix).parent / MANIFEST
        return {"indexed": str(manifest), "tokenizer": str(self.tokenizer_dir)}

    @property
    def index_cache(self) -> Path:
        """Where Megatron keeps the shuffled order of samples."""
        return Path(self.indexed.train_prefix).parent / "order"


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
        indexed = IndexedCorpus.from_json(ready["indexed"])
        return PreparedData(indexed, load_tokenizer(ready["tokenizer"]), ready["tokenizer"])
    corpus = open_corpus(data)
    directory = data.tokenizer or tokenizer or _trained(corpus, data)
    loaded = load_tokenizer(directory)
    indexed = build_indexed(corpus, loaded, cache_dir(data, "data"), seq_length=data.seq_length, bos=data.bos)
    check_ends(data, indexed.beginning, indexed.eod)
    return PreparedData(indexed, loaded, directory)


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that the configuration names.

    Raises:
        InputError: as `load_corpus`.
    """
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
