"""What a packed corpus is, read with numpy from the files alone: the format's header, the documents, their order.

Sources: megatron/core/datasets/indexed_dataset.py@0.13.1 (`_IndexWriter`) and gpt_dataset.py@0.13.1 (what its three
files of an order mean: documents one after the other, then where each sample begins, then which sample is which).
"""

import json
import struct
from pathlib import Path

import numpy as np

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")


def documents(prefix: str) -> list[np.ndarray]:
    """Every document's token ids, from `.idx` and `.bin`."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, _ = _HEADER.unpack_from(index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
    begins = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
    tokens, size = np.fromfile(f"{prefix}.bin", DTYPES[code]), np.dtype(DTYPES[code]).itemsize
    return [
        tokens[begin // size : begin // size + length] for begin, length in zip(begins, lengths, strict=True)
    ]


class PackedStream:
    """The sequences of a split in the order that a directory of Megatron's files gives them.

    Args:
        cache: that directory.
        prefix: of the corpus's files.
        sequence_length: s.
        split: "train" or "valid".
        whole_pass: the order of exactly one pass over the split, not that of a number of samples.
    """

    def __init__(
        self, cache: str | Path, prefix: str, sequence_length: int, split: str, whole_pass: bool = False
    ) -> None:
        described = {
            path: json.loads(path.read_text())
            for path in Path(cache).glob(f"*-GPTDataset-{split}-description.txt")
        }
        (found,) = (
            path
            for path, said in described.items()
            if said["dataset_path"] == prefix and (said["num_samples"] is None) == whole_pass
        )
        own = str(found).removesuffix("description.txt")
        order, self.starts, self.shuffled = (
            np.load(f"{own}{name}_index.npy") for name in ("document", "sample", "shuffle")
        )
        texts = documents(prefix)
        self.stream = np.concatenate([texts[number] for number in order])
        self.begins = np.concatenate([[0], np.cumsum([len(texts[number]) for number in order])])
        self.length = sequence_length

    def __len__(self) -> int:
        return len(self.starts) - 1

    def item(self, number: int) -> np.ndarray:
        """The s + 1 tokens of an item: its tokens and, one later, its labels."""
        document, offset = self.starts[self.shuffled[number]]
        begin = self.begins[document] + offset
        return self.stream[begin : begin + self.length + 1]


class Blend:
    """Items of several streams, as Megatron's BlendedDataset deals them out.

    Args:
        cache: of its files.
        streams: in the order of the blend.
        split: "train" or "valid".
    """

    def __init__(self, cache: str | Path, streams: list[PackedStream], split: str = "train") -> None:
        (which,) = Path(cache).glob(f"*-BlendedDataset-{split}-dataset_index.npy")
        (items,) = Path(cache).glob(f"*-BlendedDataset-{split}-dataset_sample_index.npy")
        self.which, self.items, self.streams = np.load(which), np.load(items), streams

    def __len__(self) -> int:
        return len(self.which)

    def item(self, number: int) -> np.ndarray:
        """As `PackedStream.item`."""
        return self.streams[self.which[number]].item(self.items[number])
