"""Distillation losses on vocabulary-parallel Megatron models; each returns sums over tokens, as its schedules expect.

Shapes: s, b sequence and batch; h, h_t hidden sizes of student and teacher; v_s, v_t their padded vocabularies; tp the
tensor-parallel size. Context parallelism needs nothing here: each rank has its own tokens, and sums are reduced later.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.loss.fused import (
    FusedLoss,
    HiddenRows,
    Job,
    chunk_tokens,
    default_chunk_bytes,
    fused_pass,
)
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.top_k import TopKRows
from nemo_minitron.distillation.loss.vocabulary import VocabShard, check_aligned, vocab_shard
from nemo_minitron.errors import InputError


class LossSums(NamedTuple):
    """Sums over the rank's unmasked tokens, scalars, the same on all tensor-parallel ranks.

    Attributes:
        loss: T^2 * D + ce_weight * CE, nats; carries gradients.
        tokens: sum of the loss mask, float32.
        kd: T^2 * D alone, nats, detached.
        ce: next-token cross-entropy alone, nats, detached; None without labels.
    """

    loss: Tensor
    tokens: Tensor
    kd: Tensor
    ce: Tensor | None


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher by what enters its output layer.

    Attributes:
        hidden: [s, b, h_t], or the rank's [s/tp, b, h_t] under sequence parallelism; no gradient flows.
        head: [v_t/tp, h_t], the rank's own rows, cut where the student's are cut (`vocabulary.align_head`).
    """

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """A cached teacher by its k most probable tokens; the same on every tensor-parallel rank.

    Attributes:
        values: logits [s, b, k], not divided by T; any common shift cancels without a tail only.
        indices: tokens, global, integers [s, b, k], distinct at each token.
        tail_logsumexp: log-sum-exp of all other tokens' logits / T [s, b], at the loss's own T; None where the settings
            leave the tail out.
    """

    values: Tensor
    indices: Tensor
    tail_logsumexp: Tensor | None = None


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: HiddenTeacher | TopKTeacher,
    loss_mask: Tensor,
    settings: LossSettings,
    *,
    vocab_size: int,
    labels: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> LossSums:
    """Output layers, loss and (where gradients are on) its gradients, a chunk of tokens at a time.

    No tensor of tokens x vocabulary is ever formed: beside the gradients of hidden states and head, memory is that of
    one chunk. Gradients are formed in this call and scaled in backward, which can run only once; the head's are summed
    in float32, and reach a tied head or DDP's buffers through autograd. Products and softmaxes are float32 whatever the
    inputs. Padding rows of the heads take no part, and get zero gradients.

    Args:
        student_hidden: [s, b, h], or the rank's [s/tp, b, h] under sequence parallelism (told by `loss_mask`): then it
            is gathered, and its gradient scattered, here.
        student_head: [v_s/tp, h], the rank's own rows, of the same dtype; without bias.
        teacher: see the classes.
        loss_mask: [b, s], 0 for tokens left out (any non-negative weights are legal).
        settings: which loss.
        vocab_size: of both models' tokenizer, without padding.
        labels: next tokens [b, s], global; an unmasked one outside the vocabulary makes the loss NaN. Needed for a
            ce_weight above 0.
        chunk_bytes: budget for the chunk's logits; None is 256 MiB, and 1 GiB on CUDA. On a CPU, chunks have at most
            256 tokens.

    Raises:
        InputError: the vocabulary is larger than a head; the teacher's head is cut elsewhere; top_k does not fit.
    """
    assert student_hidden.dtype == student_head.dtype, (
        "the student's hidden states and head have different dtypes"
    )
    shard = vocab_shard(student_head.shape[0], vocab_size)
    tokens = loss_mask.shape[1], loss_mask.shape[0]
    weight = _by_token(loss_mask).to(torch.promote_types(student_head.dtype, torch.float32))
    rows = _teacher_rows(teacher, settings, tokens, len(student_head), shard, vocab_size)
    buffers = 2 if isinstance(rows, HiddenRows) else 1
    budget = default_chunk_bytes(student_head.device) if chunk_bytes is None else chunk_bytes
    # By the padded rows: true ones differ between ranks, and their chunks must not.
    count = chunk_tokens(
        len(weight), len(student_head), buffers, weight.element_size(), budget, student_head.device
    )
    unmasked = weight.sum(dtype=torch.float32)
    columns = None
    if labels is not None:
        columns = _label_columns(_by_token(labels), shard)
        weight = poison(weight, _by_token(labels), vocab_size)
    job = Job(rows, weight, columns, settings, shard, count, _is_whole(student_hidden, tokens))
    assert labels is not None or not settings.ce_weight, "the cross-entropy needs labels"
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad):
        loss, kd, ce = FusedLoss.apply(student_hidden, student_head, job)
    else:
        outcome = fused_pass(job, student_hidden.detach(), student_head.detach(), False, False)
        loss, kd, ce = outcome.kd + settings.ce_weight * outcome.ce, outcome.kd, outcome.ce
    return LossSums(loss, unmasked, kd, None if labels is None else ce)


def _by_token(t: Tensor) -> Tensor:
    """[b, s] to [s * b], in the order of hidden states [s, b, h]."""
    return t.detach().t().reshape(-1)


def _is_whole(hidden: Tensor, tokens: tuple[int, int]) -> bool:
    s, b = tokens
    assert hidden.shape[1] == b, f"hidden states of {hidden.shape[1]} sequences, a loss mask of {b}"
    assert hidden.shape[0] in (s, s / parallel.tp_size()), f"{hidden.shape[0]} of {s} tokens' hidden states"
    return hidden.shape[0] == s


def poison(weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """NaN where an unmasked label is no token: refusing it by name would wait for the device at every step."""
    return weight.masked_fill((weight != 0) & ((labels < 0) | (labels >= vocab_size)), torch.nan)


def _label_columns(labels: Tensor, shard: VocabShard) -> Tensor:
    columns = labels - shard.first
    return columns.where((columns >= 0) & (columns < shard.columns), -1)


def _teacher_rows(
    teacher: HiddenTeacher | TopKTeacher,
    settings: LossSettings,
    tokens: tuple[int, int],
    student_rows: int,
    shard: VocabShard,
    vocab_size: int,
) -> HiddenRows | TopKRows:
    if isinstance(teacher, HiddenTeacher):
        check_top_k(settings, vocab_size)
        head, hidden = teacher.head.detach(), teacher.hidden.detach()
        assert hidden.dtype == head.dtype, "the teacher's hidden states and head have different dtypes"
        check_aligned(head, student_rows, shard)
        whole = hidden if _is_whole(hidden, tokens) else parallel.gather_sequence(hidden)
        return HiddenRows(whole.flatten(0, 1), head[: shard.columns])
    k = teacher.values.shape[-1]
    if settings.top_k not in (None, k):
        raise InputError(f"top_k {settings.top_k}: the cached teacher has {k} tokens; must be that, or null")
    if settings.tail and teacher.tail_logsumexp is None:
        raise InputError("tail true: the cached teacher has no tail; must be false")
    assert teacher.values.shape == teacher.indices.shape == (*tokens, k), "not the loss mask's tokens"
    tail = teacher.tail_logsumexp if settings.tail else None
    values, indices = teacher.values.detach().flatten(0, 1), teacher.indices.flatten(0, 1).long()
    return TopKRows(values, indices, None if tail is None else tail.detach().flatten())


def check_top_k(settings: LossSettings, vocab_size: int) -> None:
    """Refuse more tokens than there are.

    Raises:
        InputError: top_k above the vocabulary.
    """
    if settings.top_k is not None and settings.top_k > vocab_size:
        raise InputError(f"top_k {settings.top_k}: must be at most {vocab_size}, the vocabulary")
