"""From a `DataConfig` to index files and a tokenizer directory, each made once and cached."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config import DataConfig, cache_dir
from nemo_minitron.data.corpora import Corpus, load_corpus
from nemo_minitron.data.indexed import IndexedCorpus, build_indexed, exclusive
from nemo_minitron.data.tokenizer import load_tokenizer, train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """An indexed corpus and the tokenizer it was indexed with. `tokenizer_dir`: a Hugging Face directory or hub id."""

    corpus: Corpus
    indexed: IndexedCorpus
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_dir: str

    @property
    def index_cache(self) -> Path:
        """Where Megatron keeps the shuffled order of samples."""
        return Path(self.indexed.train_prefix).parent / "order"


def prepare_data(data: DataConfig, tokenizer: str | None = None) -> PreparedData:
    """Open the corpus, find or train the tokenizer, build or find the index.

    Args:
        tokenizer: the checkpoint's own, used where the configuration names none; with neither, a BPE is trained.

    Raises:
        InputError: as `load_corpus`, `train_bpe` and `build_indexed`.
    """
    corpus = load_corpus({k: v for k, v in vars(data).items() if v is not None})
    directory = data.tokenizer or tokenizer or _trained(corpus, data)
    loaded = load_tokenizer(directory)
    indexed = build_indexed(corpus, loaded, cache_dir(data, "data"), seq_length=data.seq_length)
    return PreparedData(corpus, indexed, loaded, directory)


def _trained(corpus: Corpus, data: DataConfig) -> str:
    key = json.dumps(["bpe", 1, corpus.manifest_sha256, data.vocab_size])
    final = cache_dir(data, "tokenizers") / hashlib.sha256(key.encode()).hexdigest()[:24]
    final.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(final.with_name(f".{final.name}.lock")):
        if not final.is_dir():
            temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            train_bpe((d.text for d in corpus.splits["train"]), data.vocab_size, temporary)
            os.replace(temporary, final)
    return str(final)
