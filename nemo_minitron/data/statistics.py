"""Numbers that a language model's loss is held against: unigram entropy, and what xz makes of the text."""

import itertools
import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_minitron.data.corpus import Corpus, Document

_READ_TOKENS = 1 << 24
_XZ_PRESET = 9
XZ_WINDOW_BYTES = 64 * 2**20


@dataclass(frozen=True)
class XzBitsPerByte:
    """Bits per byte of held-out text under `xz -9`: alone, and as what it adds to the training files.

    The second is None where the two together are larger than xz's window of 64 MiB, which then forgets some.
    """

    alone: float
    given_train: float | None


def unigram_entropy_nats(paths: str | Sequence[str]) -> float:
    """Entropy of indexed tokens' frequencies, in nats per token: the best constant guess's loss.

    Args:
        paths: the path prefix of the `.bin` and `.idx` files; or weights and prefixes in turn, of a blend.
    """
    paths = [paths] if isinstance(paths, str) else paths
    weights = [float(weight) for weight in paths[::2]] if len(paths) > 1 else [1.0]
    each = [_frequencies(prefix) for prefix in (paths[1::2] or paths)]
    mean = np.zeros(max(map(len, each)))
    for weight, found in zip(weights, each, strict=True):
        mean[: len(found)] += weight / sum(weights) * found
    frequencies = mean[mean > 0]
    return float(-(frequencies * np.log(frequencies)).sum())


def _frequencies(prefix: str) -> np.ndarray:
    """Of each token id, float64."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

    dtype = IndexedDataset(prefix).index.dtype
    tokens = np.memmap(get_bin_path(prefix), dtype=dtype, mode="r")
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), _READ_TOKENS):
        part = np.bincount(tokens[start : start + _READ_TOKENS], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    return counts / counts.sum()


def compression_bits_per_byte(corpus: Corpus) -> XzBitsPerByte:
    """What `xz -9` reaches on the held-out documents, concatenated in the corpus's order.

    `given_train` is the compressed size of train + valid less that of train, times 8, over the bytes of
    valid.
    """
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    valid_bytes = _size(valid)
    alone = 8 * _xz_size(valid) / valid_bytes
    if _size(train) + valid_bytes > XZ_WINDOW_BYTES:
        return XzBitsPerByte(alone, None)
    return XzBitsPerByte(alone, 8 * (_xz_size(itertools.chain(train, valid)) - _xz_size(train)) / valid_bytes)


def _size(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _xz_size(documents: Iterable[Document]) -> int:
    compressor = lzma.LZMACompressor(preset=_XZ_PRESET)
    size = sum(len(compressor.compress(document.text.encode())) for document in documents)
    return size + len(compressor.flush())


def bits_per_byte(loss_nats_per_token: float, tokens: float, bytes: float) -> float:
    """A mean loss in nats per token as bits per byte of text.

    Args:
        loss_nats_per_token: the mean over `tokens`.
        tokens: how many tokens the text is, with end-of-document tokens where the loss counts them.
        bytes: of the same text in UTF-8.
    """
    assert bytes > 0
    return loss_nats_per_token * tokens / math.log(2) / bytes
