"""A teacher's text as training data, alone or beside the corpus; what is held out stays the corpus's."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.data.corpora import jsonl_documents
from nemo_minitron.data.corpus import Corpus
from nemo_minitron.data.indexed import MANIFEST, IndexedCorpus, build_indexed
from nemo_minitron.data.prepare import PreparedData, open_corpus
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError

TEXT = Path("text") / "train.jsonl"


@dataclass(frozen=True)
class TeacherText:
    """The indexed text, and its share of the training sequences, in (0, 1]."""

    indexed: IndexedCorpus
    weight: float

    def paths(self, corpus: PreparedData) -> list[str]:
        """What NeMo's data module trains on: a prefix, or weights and prefixes in turn."""
        if self.weight == 1:
            return [self.indexed.train_prefix]
        others = corpus.indexed.paths("train")
        weights = map(float, others[::2]) if len(others) > 1 else [1.0]
        shares = [str((1 - self.weight) * weight) for weight in weights]
        prefixes = others[1::2] or others
        pairs = zip(shares, prefixes, strict=True)
        return [str(self.weight), self.indexed.train_prefix, *itertools.chain.from_iterable(pairs)]

    def to_config(self) -> str:
        """Where it lies, for ranks that start later."""
        return str(Path(self.indexed.train_prefix).parent / MANIFEST)


def check_mixture(run: str | None, weight: float) -> None:
    """Refuse an invalid weight, text that would not be read, and a run that has none.

    Args:
        run: a run directory of `recipes/synthesize.py`.
        weight: its text's share of the training sequences.

    Raises:
        InputError: names the value and what would be legal.
    """
    if run is None:
        if weight:
            raise InputError(
                f"distill.sdg_weight={weight}: needs sdg=RUN, a run directory of recipes/synthesize.py"
            )
        return
    if not weight:
        raise InputError(
            f"sdg={run}: would not be read with distill.sdg_weight=0.0; choose distill=sdg, sdg_kd or sdg_mixed, or "
            "a weight up to 1"
        )
    if not (Path(run) / TEXT).is_file():
        raise InputError(f"sdg={run}: no run directory of recipes/synthesize.py (no {TEXT})")
    if not (Path(run) / RESULT).is_file():
        raise InputError(f"sdg={run}: this run did not finish (no result.json)")


def prepare_text(
    run: str | None, weight: float, d: DataConfig, data: PreparedData, ready: str | None = None
) -> TeacherText | None:
    """Index a teacher's text with the corpus's tokenizer and beside its held-out split, or find it in the cache.

    Args:
        run: of `check_mixture`, as `weight`.
        d: the corpus's configuration.
        data: the corpus, prepared.
        ready: of `TeacherText.to_config`.

    Raises:
        InputError: too little text for one sequence, or an invalid line.
    """
    if run is None:
        return None
    if ready:
        return TeacherText(IndexedCorpus.from_json(ready), weight)
    text = jsonl_documents(Path(run) / TEXT)
    corpus = Corpus("sdg", {"train": text, "valid": open_corpus(d).splits["valid"]})
    indexed = build_indexed(corpus, data.tokenizer, cache_dir(d, "data"), seq_length=d.seq_length, bos=d.bos)
    return TeacherText(indexed, weight)
