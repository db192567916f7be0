"""Packed samples, on a corpus in which every token occurs once, so that each one's place can be told."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_minitron.data.datasets import gpt_dataset
from nemo_minitron.errors import InputError
from tests.support.ranks import run_on_ranks

LENGTHS = [5, 40, 1, 17, 3, 64, 9, 2, 28]
TOTAL = sum(LENGTHS)
SEQ_LENGTH = 8
EOD = 100_000


@pytest.fixture
def prefix(tmp_path) -> str:
    builder = IndexedDatasetBuilder(str(tmp_path / "unique.bin"), dtype=np.int32)
    start = 0
    for length in LENGTHS:
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(str(tmp_path / "unique.idx"))
    return str(tmp_path / "unique")


def _samples(prefix, cache, split="valid", num_samples=None, seed=1, **more) -> list[dict[str, torch.Tensor]]:
    data = gpt_dataset(prefix, split, num_samples, SEQ_LENGTH, seed, EOD, cache, **more)
    return [data[i] for i in range(len(data))]


def _tokens(samples) -> list[list[int]]:
    return [sample["tokens"].tolist() for sample in samples]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_one_epoch_and_no_padding(prefix, tmp_path, split):
    samples = _samples(prefix, tmp_path / "cache", split)
    assert len(samples) == (TOTAL - 1) // SEQ_LENGTH
    seen = [token for tokens in _tokens(samples) for token in tokens]
    assert len(seen) == len(set(seen)) == len(samples) * SEQ_LENGTH, "a token twice, or padding"
    assert set(seen) <= set(range(TOTAL))
    for sample in samples:
        assert sample["tokens"][1:].equal(sample["labels"][:-1])
        assert sample["loss_mask"].equal(torch.ones(SEQ_LENGTH))
        assert sample["position_ids"].equal(torch.arange(SEQ_LENGTH))
        assert "attention_mask" not in sample
        assert sample["labels"].dtype == torch.int64


def test_documents_stay_in_one_piece(prefix, tmp_path):
    last = {sum(LENGTHS[: i + 1]) - 1 for i in range(len(LENGTHS))}
    for sample in _samples(prefix, tmp_path / "cache"):
        for token, label in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
            # After a token comes the next one of its document; after a document's last, another's first.
            assert label in {token + 1} or (token in last and label in {0} | {end + 1 for end in last})


def test_more_samples_than_an_epoch(prefix, tmp_path):
    wanted = 3 * TOTAL // SEQ_LENGTH
    samples = _samples(prefix, tmp_path / "cache", "train", wanted)
    assert len(samples) >= wanted
    counts = np.bincount(np.array(_tokens(samples)).reshape(-1), minlength=TOTAL)
    assert len(counts) == TOTAL
    assert set(counts.tolist()) <= {2, 3, 4}


def test_deterministic_given_the_seed(prefix, tmp_path):
    first = _tokens(_samples(prefix, tmp_path / "one"))
    assert _tokens(_samples(prefix, tmp_path / "two")) == first
    assert _tokens(_samples(prefix, tmp_path / "one")) == first, "read from the cache"
    assert _tokens(_samples(prefix, tmp_path / "one", seed=2)) != first


@pytest.mark.parametrize("positions", [False, True])
def test_documents_that_do_not_see_each_other(tmp_path, positions):
    """Against a loop over the documents of each sample."""
    end, documents = 9, [[1, 2, 9], [3, 9], [4, 5, 6, 7, 8, 1, 2, 3, 4, 9], [5, 9], [6, 7, 9]]
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "d.idx"))
    options = {"reset_attention_mask": True, "reset_position_ids": positions}
    data = gpt_dataset(str(tmp_path / "d"), "train", 6, SEQ_LENGTH, 1, end, tmp_path / "cache", **options)
    for number in range(6):
        item = data[number]
        forbidden, places = np.ones((SEQ_LENGTH, SEQ_LENGTH), bool), np.arange(SEQ_LENGTH)
        starts = [0, *(np.flatnonzero(item["tokens"].numpy() == end) + 1)]
        for begin, stop in zip(starts, [*starts[1:], SEQ_LENGTH], strict=True):
            for place in range(begin, stop):
                forbidden[place, begin : place + 1] = False
                places[place] = place - begin if positions else place
        assert item["attention_mask"].dtype == torch.bool
        assert np.array_equal(item["attention_mask"][0].numpy(), forbidden)
        assert np.array_equal(item["position_ids"].numpy(), places)


class _Exploding:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("damage", ["short", "empty", "pickle", "flipped"])
def test_a_damaged_order_is_made_again(prefix, tmp_path, damage):
    cache = tmp_path / "cache"
    first = _tokens(_samples(prefix, cache))
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 3
    exploding = _Exploding(str(tmp_path / "ran"))
    for path in files:
        whole = path.read_bytes()
        if damage == "pickle":
            np.save(path, np.array([exploding], dtype=object), allow_pickle=True)
        elif damage == "flipped":
            path.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
        else:
            path.write_bytes(whole[:-4] if damage == "short" else b"")
        assert _tokens(_samples(prefix, cache)) == first
        assert path.read_bytes() == whole
    assert not (tmp_path / "ran").exists()


def _on_a_rank(prefix: str, cache: str) -> list[list[int]]:
    assert torch.distributed.get_world_size() == 2
    return _tokens(_samples(prefix, cache))


def test_the_same_on_every_rank(prefix, tmp_path):
    ranks = run_on_ranks(2, _on_a_rank, prefix, str(tmp_path / "cache"))
    assert ranks[0] == ranks[1] == _tokens(_samples(prefix, tmp_path / "alone"))


def test_bad_arguments(prefix, tmp_path):
    with pytest.raises(InputError, match="split test: must be one of train, valid"):
        gpt_dataset(prefix, "test", None, SEQ_LENGTH, 1, EOD, tmp_path)
    with pytest.raises(InputError, match=r"absent\.bin: no such index file"):
        gpt_dataset(str(tmp_path / "absent"), "train", None, SEQ_LENGTH, 1, EOD, tmp_path)
