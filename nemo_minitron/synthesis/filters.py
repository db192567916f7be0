"""Which of a teacher's texts are worth learning from."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nemo_minitron.config.synthesize import SynthesizeConfig
from nemo_minitron.synthesis.near_duplicates import NearDuplicates
from nemo_minitron.synthesis.store import Written

# In the order in which they are asked; each text is counted at the first that drops it.
FILTERS = ("undecodable", "too_short", "repetitive", "duplicate", "near_duplicate")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Text:
    """A sample with its text: `prompt` and what was written after it, `new`."""

    written: Written
    prompt: str
    new: str


def repetition(tokens: list[int], n: int) -> float:
    """The share of a text's n-grams that were there before in the same text, in [0, 1); 0 where it has none."""
    grams = windows(tokens, n)
    return 0.0 if not len(grams) else 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def windows(tokens: list[int], n: int) -> np.ndarray:
    """All n-grams of a text in order, int64 [max(0, len - n + 1), n]."""
    if len(tokens) < n:
        return np.zeros((0, n), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, dtype=np.int64), n)


class TextFilter:
    """Passes texts on, and counts those that it drops.

    Args:
        settings: the thresholds.
    """

    def __init__(self, settings: SynthesizeConfig) -> None:
        self.settings = settings
        self.dropped: Counter[str] = Counter(dict.fromkeys(FILTERS, 0))
        self._texts: set[str] = set()
        threshold = settings.near_duplicate_jaccard
        self._near = None if threshold is None else NearDuplicates(threshold)

    def keep(self, texts: Iterable[Text]) -> list[Text]:
        """Those that no filter drops, in order; of copies the first stays."""
        kept = []
        for text in texts:
            reason = self._reason(text)
            if reason is None:
                kept.append(text)
            else:
                self.dropped[reason] += 1
        return kept

    def _reason(self, text: Text) -> str | None:
        s, new = self.settings, text.written.new
        if _REPLACEMENT in text.new:
            return "undecodable"
        if len(new) < s.min_new_tokens:
            return "too_short"
        if repetition(new, s.repetition_ngram) > s.max_repetition:
            return "repetitive"
        if (bare := text.new.strip()) in self._texts:
            return "duplicate"
        if self._near is not None and self._near.seen(new):
            return "near_duplicate"
        self._texts.add(bare)
        return None
