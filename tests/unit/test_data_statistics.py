"""Statistics against values worked out by other means."""

import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_minitron.data import statistics
from nemo_minitron.data.corpus import Corpus, Document


def _indexed(prefix, documents: list[list[int]], dtype) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_entropy_of_known_frequencies(tmp_path):
    prefix = _indexed(tmp_path / "p", [[7, 9, 7, 65000], [7, 9, 7, 3]], np.int32)
    # Frequencies 1/2, 1/4, 1/8, 1/8: 1.75 bits.
    assert statistics.unigram_entropy_nats(prefix) == pytest.approx(1.75 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_entropy_over_many_reads(tmp_path, monkeypatch, dtype):
    draw = random.Random(0)
    documents = [[int(draw.expovariate(0.02)) for _ in range(draw.randrange(1, 60))] for _ in range(40)]
    counts = Counter(token for document in documents for token in document)
    total = counts.total()
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    monkeypatch.setattr(statistics, "_READ_TOKENS", 37)
    assert statistics.unigram_entropy_nats(_indexed(tmp_path / "p", documents, dtype)) == pytest.approx(
        expected
    )


def test_bits_per_byte():
    # A uniform guess over 256 byte tokens; tokens of four bytes at 2 bits each.
    assert statistics.bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert statistics.bits_per_byte(2 * math.log(2), 250, 1000) == pytest.approx(0.5)


def _corpus() -> Corpus:
    words = [f"word{i}é" for i in range(300)]
    draw = random.Random(1)

    def document(i: int) -> Document:
        return Document(str(i), " ".join(draw.choices(words, k=400)))

    return Corpus("c", {"train": [document(i) for i in range(8)], "valid": [document(i) for i in range(2)]})


def test_xz(monkeypatch):
    corpus = _corpus()
    text = {
        split: "".join(document.text for document in corpus.splits[split]).encode() for split in corpus.splits
    }
    bits = statistics.compression_bits_per_byte(corpus)
    assert bits.alone == pytest.approx(8 * len(lzma.compress(text["valid"], preset=9)) / len(text["valid"]))
    both = lzma.compress(text["train"] + text["valid"], preset=9)
    added = len(both) - len(lzma.compress(text["train"], preset=9))
    assert bits.given_train == pytest.approx(8 * added / len(text["valid"]))
    assert bits.given_train < bits.alone


def test_xz_knows_the_training_files():
    corpus = _corpus()
    copied = Corpus("c", {"train": corpus.splits["train"], "valid": corpus.splits["train"]})
    bits = statistics.compression_bits_per_byte(copied)
    assert bits.given_train < 0.05 < 1 < bits.alone


def test_xz_remembers_more_than_its_default_window_of_8_mib():
    text = _corpus().splits["train"]
    corpus = Corpus("c", {"train": [*text, Document("zeros", "0" * 9 * 2**20)], "valid": text})
    assert statistics.compression_bits_per_byte(corpus).given_train < 0.05


def test_xz_beyond_its_window(monkeypatch):
    monkeypatch.setattr(statistics, "XZ_WINDOW_BYTES", 10_000)
    bits = statistics.compression_bits_per_byte(_corpus())
    assert bits.given_train is None
    assert bits.alone > 0
