"""Conversations as training sequences of one length, whole: packed, or one a sequence; alone or beside text."""

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.data import DataConfig
from nemo_minitron.data.chat.encoded import EncodedSplit

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a sequence: the longest first, each into the fullest sequence that has room for it.

    Args:
        lengths: of the samples, none above the capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free, and the sequence's number; sorted
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[sample], -1))
        if place == len(room):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = room.pop(place)
        bins[number].append(sample)
        bisect.insort(room, (free - lengths[sample], number))
    return bins


class ConversationSequences(Dataset[dict[str, Tensor]]):
    """Sequences of the samples in a file of `encode_split`, in a new order each epoch, without end.

    An item has what GPTDataset's have: `tokens`, `labels` (the next tokens) and `position_ids`, int64 [s], `loss_mask`,
    float32 [s], 1 where the label is an answer's, and with `reset_attention_mask` an `attention_mask`, bool [1, s, s],
    true where attention is forbidden. Samples are whole; what is left of a sequence is padded, without a loss.

    Args:
        path: of the file.
        d: seq_length, seed of the order, and whether the samples of a sequence see each other.
        packed: several samples in a sequence, as many as there is room for; else one.
        pad: the token after the last sample.
        count: items; None: one epoch.
    """

    def __init__(self, path: str, d: DataConfig, *, packed: bool, pad: int, count: int | None = None) -> None:
        self._d, self._pad = d, pad
        self._samples = _read(path)
        lengths = [len(tokens) for tokens, _ in self._samples]
        self._bins = pack(lengths, d.seq_length) if packed else [[i] for i in range(len(lengths))]
        self._count = len(self._bins) if count is None else count
        self._order: tuple[int, Any] = (-1, None)

    @property
    def epoch(self) -> int:
        """Sequences that hold each sample once."""
        return len(self._bins)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < self._count:
            raise IndexError(number)
        epoch, place = divmod(int(number), len(self._bins))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._d.seed, epoch]).permutation(len(self._bins))
        return self._item([self._samples[i] for i in self._bins[self._order[1][place]]])

    def _item(self, samples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        s = self._d.seq_length
        tokens = torch.full((s + 1,), self._pad, dtype=torch.int64)
        learned = torch.zeros(s + 1)
        begins, end = [], 0
        for ids, mask in samples:
            begins.append(end)
            tokens[end : end + len(ids)] = torch.from_numpy(ids.astype(np.int64))
            learned[end : end + len(ids)] = torch.from_numpy(mask.astype(np.float32))
            end += len(ids)
        item = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": learned[1:]}
        return {**item, **_limits(self._d, [*begins, *([end] if end < s else [])])}


def _limits(d: DataConfig, begins: Sequence[int]) -> dict[str, Tensor]:
    """Positions, and the mask where documents do not see each other, of documents that begin at these tokens."""
    positions = torch.arange(d.seq_length)
    document = torch.zeros(d.seq_length, dtype=torch.int64)
    document[list(begins)] = 1
    document = document.cumsum(0) - 1
    found = {"position_ids": positions}
    if d.reset_position_ids:
        found["position_ids"] = positions - torch.tensor(begins)[document]
    if d.reset_attention_mask:
        sees = (positions[:, None] >= positions) & (document[:, None] == document)
        found["attention_mask"] = ~sees[None]
    return found


def _read(path: str) -> list[tuple[Any, Any]]:
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    return [(np.array(row["tokens"], np.int32), np.array(row["loss_mask"], np.uint8)) for row in rows]


class Mixture(Dataset[dict[str, Tensor]]):
    """Sequences of two sets, in the order in which Megatron blends corpora: at each step the one that is behind.

    Args:
        first, second: data sets with GPTDataset's items, as long as they are asked for.
        share: of the first, in (0, 1).
        count: items.

    Source: megatron/core/datasets/blended_dataset.py@0.13.1.
    """

    def __init__(self, first: Any, second: Any, share: float, count: int) -> None:
        from megatron.core.datasets import helpers

        self._sets = (first, second)
        self._set, self._number = np.zeros(count, np.int16), np.zeros(count, np.int64)
        helpers.build_blending_indices(self._set, self._number, [share, 1 - share], 2, count, False)

    def __len__(self) -> int:
        return len(self._set)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        item = self._sets[self._set[number]][int(self._number[number])]
        return {key: item[key] for key in _KEYS if key in item}


@dataclass(frozen=True)
class Conversations:
    """What a training reads of conversations; what it holds out is all conversations.

    `weight`: their share of the training sequences, the rest is of the corpus. `packed`: several in a sequence. `pad`:
    the token after the last one. `tokenizer`: a directory, with the chat template.
    """

    train: EncodedSplit
    valid: EncodedSplit
    weight: float
    packed: bool
    pad: int
    tokenizer: str

    def to_config(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_config(cls, fields: dict[str, Any]) -> "Conversations":
        """Of `to_config`."""
        splits = {name: EncodedSplit(**fields[name]) for name in ("train", "valid")}
        return cls(**{**fields, **splits})

    def sha256(self, corpus: str) -> str:
        """Names the sequences, those of a corpus with this hash among them."""
        # The files are named by their content.
        named = [corpus, self.train.path[-40:], self.valid.path[-40:], self.weight, self.packed, self.pad]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def dataset(self, split: str, d: DataConfig, count: int | None = None, text: Any = None) -> Any:
        """The sequences of a split.

        Args:
            split: "train" or "valid".
            count: items; None: one epoch of the conversations.
            text: what the train split is mixed with, where `weight` is below 1; it has at least `count` items.
        """
        of = self.train if split == "train" else self.valid
        own = ConversationSequences(of.path, d, packed=self.packed, pad=self.pad, count=count)
        if split != "train" or self.weight == 1:
            return own
        assert count is not None
        return Mixture(own, text, self.weight, count)
