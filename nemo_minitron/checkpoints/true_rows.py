"""Saved checkpoints without the rows that fill up a vocabulary: what other layouts, and other programs, read."""

import pickle
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.untrusted import table_of_contents
from nemo_minitron.files import replacing

_TABLES = (
    "module.embedding.word_embeddings.weight",
    "module.output_layer.weight",
    "module.output_layer.bias",
)


def cut_padding(weights: Path, vocab_size: int) -> None:
    """Let a distributed checkpoint's embedding and output layer end with the vocabulary; one rank calls.

    Megatron-core saves equal parts only, padding included. What is in a file's part is said by its table of contents,
    and torch reads as much of each part as that says (torch.distributed.checkpoint.filesystem@2.13.0, read_data), so
    the table alone is written anew, and replaced at once. Optimizer states keep their padding, which resuming under
    another layout fills up or leaves out.

    Args:
        weights: the directory of a finished `torch_dist` checkpoint.
        vocab_size: the rows to keep.
    """
    file = weights / ".metadata"
    contents = table_of_contents(file, str(weights.parent))
    longer = {
        name: stored
        for name in _TABLES
        if (stored := contents.state_dict_metadata.get(name)) is not None and stored.size[0] > vocab_size
    }
    if not longer:
        return
    for name, stored in longer.items():
        stored.size = _cut(stored.size, vocab_size)
        stored.chunks = [chunk for chunk in stored.chunks if chunk.offsets[0] < vocab_size]
        for chunk in stored.chunks:
            chunk.sizes = _cut(chunk.sizes, min(chunk.sizes[0], vocab_size - chunk.offsets[0]))
        for index in [i for i in contents.storage_data if i.fqn == name and i.offset[0] >= vocab_size]:
            del contents.storage_data[index]
    with replacing(file) as temporary:
        temporary.write_bytes(pickle.dumps(contents))


def _cut(shape: Any, rows: int) -> torch.Size:
    return torch.Size([rows, *shape[1:]])
