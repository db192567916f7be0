"""Texts that share most of their n-grams, found by MinHash and confirmed exactly."""

import numpy as np

_SHINGLE = 5
_BANDS, _ROWS = 16, 4  # two texts of Jaccard index 0.7 meet in a band with probability 0.99, of 0.3 with 0.12
_ODD = np.uint64(0x9E3779B97F4A7C15)


class NearDuplicates:
    """Remembers texts, and says of each new one whether it is nearly one of them.

    Two texts are compared by the Jaccard index of their sets of 5-grams of tokens; locality-sensitive hashing chooses
    with which earlier texts (A. Broder, "On the resemblance and containment of documents", 1997).

    Args:
        threshold: the index from which on two texts count as the same, in (0, 1].
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        draw = np.random.default_rng(0).integers(0, 2**64, (2, _BANDS * _ROWS, 1), dtype=np.uint64)
        self._multiply, self._add = draw[0] | np.uint64(1), draw[1]
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._shingles: list[np.ndarray] = []

    def seen(self, tokens: list[int]) -> bool:
        """Whether a text is nearly one of those before; if not, it is remembered."""
        shingles = _shingles(tokens)
        keys = self._keys(shingles)
        candidates = {number for key in keys for number in self._buckets.get(key, ())}
        if any(_jaccard(shingles, self._shingles[number]) >= self.threshold for number in candidates):
            return True
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._shingles))
        self._shingles.append(shingles)
        return False

    def _keys(self, shingles: np.ndarray) -> list[tuple[int, bytes]]:
        # Multiplication modulo 2^64 by an odd number is a permutation whose low bits mix badly; min goes by the high.
        least = (shingles[None, :] * self._multiply + self._add).min(axis=1).reshape(_BANDS, _ROWS)
        return [(band, row.tobytes()) for band, row in enumerate(least)]


def _shingles(tokens: list[int]) -> np.ndarray:
    """Sorted distinct hashes of a text's 5-grams, uint64 [n]; a shorter text is one of them."""
    size = max(1, min(_SHINGLE, len(tokens)))
    ids = np.asarray(tokens or [-1], dtype=np.int64).astype(np.uint64) + np.uint64(1)
    hashed = np.zeros(max(1, len(ids) - size + 1), dtype=np.uint64)
    for offset in range(size):
        hashed = (hashed ^ ids[offset : offset + len(hashed)]) * _ODD
        hashed ^= hashed >> np.uint64(29)
    return np.unique(hashed)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
