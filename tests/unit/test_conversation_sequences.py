"""Conversations as training sequences: packing, items, the order of epochs, and Megatron's blending beside text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.config.data import DataConfig
from nemo_minitron.data.chat.encoded import EncodedSplit
from nemo_minitron.data.chat.sequences import Conversations, ConversationSequences, Mixture, pack

PAD = 9
# (tokens, loss mask); the tens say which sample a token is of.
SAMPLES = [
    ([11, 12, 13, 14], [0, 0, 1, 1]),
    ([21, 22, 23], [0, 1, 1]),
    ([31, 32, 33, 34, 35, 36, 37, 38], [0, 0, 0, 1, 1, 0, 0, 1]),
    ([41, 42], [0, 1]),
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "samples.jsonl"
    rows = [{"tokens": tokens, "loss_mask": mask} for tokens, mask in SAMPLES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(file: str, *, packed: bool = True, count: int | None = None, **d: Any) -> ConversationSequences:
    return ConversationSequences(
        file, DataConfig(**{"seq_length": 8, **d}), packed=packed, pad=PAD, count=count
    )


def test_packing_wastes_little_and_loses_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500).tolist()
    bins = pack(lengths, 64)
    assert sorted(sample for each in bins for sample in each) == list(range(500))
    filled = [sum(lengths[i] for i in each) for each in bins]
    assert max(filled) <= 64
    # Best fit decreasing needs at most 11/9 of the fewest, which are no fewer than the tokens fill.
    assert len(bins) <= 11 / 9 * (sum(lengths) / 64) + 1
    assert pack([3, 3, 3, 3], 6) == [[0, 1], [2, 3]]


def test_a_packed_sequence_holds_whole_samples_and_learns_their_answers(file: str) -> None:
    """The largest first: samples 0, 1 fill seven of eight; 3 does not fit beside them."""
    items = {tuple(item["tokens"].tolist()): item for item in made(file)}
    assert set(items) == {
        (31, 32, 33, 34, 35, 36, 37, 38),
        (11, 12, 13, 14, 21, 22, 23, PAD),
        (41, 42, PAD, PAD, PAD, PAD, PAD, PAD),
    }
    item = items[(11, 12, 13, 14, 21, 22, 23, PAD)]
    assert item["labels"].tolist() == [12, 13, 14, 21, 22, 23, PAD, PAD]
    # Where the label is an answer's token: neither the next sample's first one nor padding is.
    assert item["loss_mask"].tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
    assert item["position_ids"].tolist() == list(range(8))
    assert "attention_mask" not in item
    whole = items[(31, 32, 33, 34, 35, 36, 37, 38)]
    assert whole["loss_mask"].tolist() == [0, 0, 1, 1, 0, 0, 1, 0]


def test_one_sample_a_sequence(file: str) -> None:
    sequences = made(file, packed=False)
    assert sequences.epoch == len(sequences) == 4
    first = {int(item["tokens"][0]): item for item in sequences}
    assert first[41]["tokens"].tolist() == [41, 42] + [PAD] * 6
    assert first[41]["loss_mask"].tolist() == [1] + [0] * 7
    assert sum(float(item["loss_mask"].sum()) for item in sequences) == sum(sum(m) for _, m in SAMPLES)


def test_samples_may_not_see_each_other(file: str) -> None:
    items = made(file, reset_attention_mask=True, reset_position_ids=True)
    item = next(item for item in items if item["tokens"][0] == 11)
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    sample = [0, 0, 0, 0, 1, 1, 1, 2]
    forbidden = [[not (j <= i and sample[i] == sample[j]) for j in range(8)] for i in range(8)]
    assert item["attention_mask"].tolist() == [forbidden]


def test_each_epoch_has_every_sequence_in_an_order_of_its_own(file: str) -> None:
    sequences = made(file, packed=False, count=400)
    firsts = [int(item["tokens"][0]) for item in sequences]
    epochs = [tuple(firsts[i : i + 4]) for i in range(0, 400, 4)]
    assert all(sorted(epoch) == [11, 21, 31, 41] for epoch in epochs)
    assert len(set(epochs)) == 24, "all orders"
    again = made(file, packed=False, count=8)
    assert [int(again[i]["tokens"][0]) for i in (7, 0, 5)] == [firsts[i] for i in (7, 0, 5)]
    other = made(file, packed=False, count=400, seed=1)
    assert [int(item["tokens"][0]) for item in other] != firsts
    with pytest.raises(IndexError):
        again[8]


def test_text_is_mixed_in_as_megatron_blends_corpora() -> None:
    """At each step the set that is behind its share; the text's other keys do not come along."""
    text = [{"tokens": torch.tensor([i]), "dataset_id": 3} for i in range(100)]
    talks = [{"tokens": torch.tensor([-i])} for i in range(1, 101)]
    found = [item["tokens"].item() for item in Mixture(talks, text, 0.7, 100)]
    drawn: list[int] = []
    talked = 0
    for step in range(100):
        # megatron/core/datasets/helpers.cpp, build_blending_indices
        behind = [0.7 * max(step, 1) - talked, (1 - 0.7) * max(step, 1) - (step - talked)]
        if behind[0] >= behind[1]:
            talked += 1
            drawn.append(-talked)
        else:
            drawn.append(step - talked)
    assert found == drawn
    assert sum(each < 0 for each in found) == 70
    assert set(Mixture(talks, text, 0.7, 5)[1]) == {"tokens"}


def test_conversations_travel_as_plain_values(file: str) -> None:
    split = EncodedSplit(file, samples=4, dropped=0, cut=0, refused=0, tokens=17, answer_tokens=8)
    c = Conversations(split, split, 1.0, True, PAD, "/tokenizer")
    assert Conversations.from_config(json.loads(json.dumps(c.to_config()))) == c
    others = [
        c,
        Conversations(split, split, 0.7, True, PAD, "/t"),
        Conversations(split, split, 1.0, False, PAD, "/t"),
    ]
    assert len({each.sha256("corpus") for each in others} | {c.sha256("another")}) == 4
