"""Which rows of a vocabulary-parallel head a rank holds, and how a teacher's head is cut like a student's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import InputError


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the true vocabulary: `columns` tokens (0 or more) from token `first` on."""

    first: int
    columns: int


def vocab_shard(padded_columns: int, vocab_size: int) -> VocabShard:
    """This rank's part of the true vocabulary.

    Args:
        padded_columns: v/tp, the rows of the rank's head shard, or columns of its logits, padding included.
        vocab_size: the true vocabulary, without padding.

    Raises:
        InputError: all ranks together hold fewer than `vocab_size`.
    """
    ranks = parallel.tp_size()
    if not 0 < vocab_size <= padded_columns * ranks:
        raise InputError(
            f"vocabulary of {vocab_size} tokens: the output layer has {padded_columns * ranks} rows "
            f"({padded_columns} on each of {ranks} tensor-parallel ranks), must be between 1 and that"
        )
    first = parallel.tp_rank() * padded_columns
    return VocabShard(first, min(max(vocab_size - first, 0), padded_columns))


def shared_vocab_size(student: int, teacher: int) -> int:
    """The true vocabulary of both models.

    Args:
        student: its tokenizer's tokens, padding left out.
        teacher: likewise.

    Raises:
        InputError: they differ.
    """
    if student != teacher:
        raise InputError(
            f"the teacher's vocabulary has {teacher} tokens, the student's {student}: both must be of one tokenizer"
        )
    return student


def align_head(teacher_head: Tensor, student_rows: int, vocab_size: int) -> Tensor:
    """Cut the teacher's head where the student's is cut, so that each rank holds the same tokens of both.

    Heads of one true vocabulary are padded to different sizes when they were made under different tensor-parallel
    sizes or `make_vocab_size_divisible_by`, and their shards then begin at different tokens. To be called once, by all
    tensor-parallel ranks together: rows move between them. Without a difference the given tensor's own rows return.

    Args:
        teacher_head: [v_t/tp, h_t], the rank's own; no gradient flows.
        student_rows: v_s/tp, rows of the student's shard, padding included.
        vocab_size: the true vocabulary of both.

    Returns:
        The rank's own [columns, h_t], without padding (`vocab_shard(student_rows, vocab_size).columns`).

    Raises:
        InputError: one of the heads is smaller than the vocabulary.
    """
    teacher_head = teacher_head.detach()
    wanted = vocab_shard(student_rows, vocab_size)
    held = vocab_shard(teacher_head.shape[0], vocab_size)
    if teacher_head.shape[0] == student_rows:
        return teacher_head[: wanted.columns]
    send = []
    for rank in range(parallel.tp_size()):
        begin, end = (min(max(k * student_rows - held.first, 0), held.columns) for k in (rank, rank + 1))
        send.append(teacher_head[begin:end])
    return torch.cat(parallel.exchange_tp(send))


def check_aligned(teacher_head: Tensor, student_rows: int, shard: VocabShard) -> None:
    """Refuse a teacher's head shard [v_t/tp, h_t] that is not cut like the student's.

    Raises:
        InputError: its rows are neither those of the student's shard nor those that `align_head` gives.
    """
    rows = teacher_head.shape[0]
    if rows not in (student_rows, shard.columns) and not (parallel.tp_size() == 1 and rows > shard.columns):
        raise InputError(
            f"the teacher's head shard has {rows} rows, the student's {student_rows} with {shard.columns} true tokens:"
            " they are padded differently; pass the teacher's through align_head"
        )
