"""Logits of a NeMo 2 checkpoint with one layer in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.export.distributed_reader import DistributedReader
from nemo_minitron.workflows.one_layer import OneLayer


def logits(
    source: Source,
    reader: DistributedReader,
    tokens: Tensor,
    *,
    vocab_rows: int,
    rounded: Callable[[Tensor], Tensor] = lambda weight: weight,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """What Megatron-core's forward pass gives, computed in float32 in one process.

    Args:
        source: of kind "nemo".
        reader: of its weights.
        tokens: int64 [b, s].
        vocab_rows: of the stored embeddings, those that pad the vocabulary included.
        rounded: what becomes of each weight, float32 [..., in], when it is written.
        progress: told how many layers are done.

    Returns:
        float32 [b, s, vocab_rows].
    """
    one = OneLayer(source, reader, vocab_rows=vocab_rows, rounded=rounded)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {"tokens": tokens, "position_ids": positions}
    state = normed = None
    with torch.inference_mode():
        for number in range(one.layers):
            with one.as_layer(number):
                state, normed = one.forward(batch, state)
            progress(number + 1)
        assert normed is not None
        return one.logits(normed)
