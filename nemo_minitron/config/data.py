"""The schema of the group `data`: a corpus, its tokenizer, and how it is packed."""

from dataclasses import dataclass
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import Beginning, Choice, Files, NotNegative, PathName, Range, Seed


@dataclass
class CorpusConfig:
    """The keys of a corpus; `DataConfig` says what they mean."""

    train: Files = None
    valid: Files = None
    text_key: str | None = None
    valid_fraction: Annotated[float, Range(above=0, below=1)] | None = None
    path: PathName | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    valid_split: str | None = None


@dataclass
class BlendPart(CorpusConfig):
    """One corpus of a blend: `weight`, its share of the sequences in proportion to the other parts' (0: it is not
    read), and the keys of the corpus `name` ("files", "hf" or "stdlib"), as in `data`.
    """

    weight: NotNegative = MISSING
    name: str = "files"


@dataclass
class DataConfig(CorpusConfig):
    """A corpus, its tokenizer, and how it is packed.

    `name`: "stdlib", the source of Python's standard library; "files"; "hf", a dataset of the hub; "blend".
    `seq_length`: tokens of a packed sequence. `tokenizer`: a Hugging Face directory or id; null takes the
    checkpoint's or, in pretraining, trains a BPE of `vocab_size` on the train split. `seed`: of the documents' order.
    `cache_dir`: where indices and converted checkpoints are kept; null: $NEMO_MINITRON_HOME, else
    ~/.cache/nemo_minitron.

    `bad_records`: what is done with records that cannot be used, of corpora, conversations and preferences: "refuse"
    them, all at once, or "skip" them and say how many.

    `bos`: whether documents begin with the beginning token, "auto" (as the tokenizer does by itself), true or false
    (`data.beginning`). `reset_attention_mask`: a document of a packed sequence does not see those before it;
    `reset_position_ids`: and its positions begin at 0.

    "files": `train` and `valid`, each a glob or a list of them; a file of records (.jsonl, .ndjson, .json, .parquet,
    also compressed) has one document a record, under `text_key`; any other file is one document. `valid_fraction`: of
    the train split's documents, held out by their hash where there is no valid split. "hf": `path`, the dataset's id or
    a directory, its `config` and `revision`, and which of its splits are `train_split` and `valid_split`; `text_key`
    and `valid_fraction` as above. "blend": `blend`, a list of corpora: of each its `weight` in
    proportion to the others' (0: it is not read), `name` ("files") and that corpus's keys.

    `tokens`: how many a run reads for calibration or training, in place of `prune.calibration_samples`,
    `distill.max_steps` or `trainer.max_steps`; null: what those say.
    """

    name: str = "stdlib"
    seq_length: Annotated[int, Range(least=2)] = 512
    tokenizer: PathName | None = None
    vocab_size: Annotated[int, Range(least=1, most=10_000_000)] = 1024
    cache_dir: PathName | None = None
    bad_records: Annotated[str, Choice("refuse", "skip")] = "refuse"
    bos: Beginning = "auto"
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    seed: Seed = 1234
    blend: list[BlendPart] | None = None
    tokens: Annotated[int, Range(least=1, most=10**15)] | None = None
