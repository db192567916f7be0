"""Vocabularies that the tensor-parallel size does not divide: rows that fill the last ranks up and count for nothing.

Embedding and output layer have as many rows on every rank; those past the vocabulary are zero, their logits are never
said, and so no softmax, loss, sample or gradient knows of them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel

# In place of a padding row's logit: e to it is 0 in any precision, and it is finite, so that 0 times it is no NaN.
_NEVER = -1e30


def padded_rows(vocab_size: int, ranks: int) -> int:
    """The least number of rows, over all tensor-parallel ranks, that holds the vocabulary."""
    return -(-vocab_size // ranks) * ranks


def true_rows(rows: int, vocab_size: int) -> int:
    """How many of the rank's rows, or columns of logits, are of the vocabulary; those after them are padding."""
    return min(max(vocab_size - parallel.tp_rank() * rows, 0), rows)


@torch.no_grad()
def leave_out_padding(model: Any, vocab_size: int) -> None:
    """Zero a model's padding rows, and hide their logits from whatever reads the output layer.

    To be called once, when the model has been built; weights loaded later must be zero in these rows, as those are
    that megatron-core reads from a smaller table (`allow_shape_mismatch`, dist_checkpointing/mapping.py@0.13.1). What
    multiplies with the output layer's weight itself, as `distillation.losses` do, is told the vocabulary.

    Args:
        model: this rank's megatron-core GPTModel, of any pipeline stage.
        vocab_size: rows of the whole embedding that are no padding.
    """
    for parameter in _tables(model):
        parameter[true_rows(len(parameter), vocab_size) :] = 0
    if model.post_process and model.vocab_size != vocab_size:
        model.output_layer.register_forward_hook(functools.partial(_hide, vocab_size))


def _tables(model: Any) -> list[Tensor]:
    """The parameters [v/tp, h] and [v/tp] that have a row for each token."""
    embedding = [model.embedding.word_embeddings.weight] if model.pre_process else []
    return [*embedding, *(model.output_layer.parameters() if model.post_process else [])]


def _hide(vocab_size: int, layer: Any, arguments: Any, output: Any) -> Any:
    """The output layer's (logits, bias) with `_NEVER` as padding's logits."""
    logits = output[0]
    columns = logits.shape[-1]
    whole = columns == layer.output_size
    first = vocab_size if whole else true_rows(columns, vocab_size)
    if first < columns:
        logits[..., first:] = _NEVER
    return output
