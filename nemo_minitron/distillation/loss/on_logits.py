"""The same losses on logits, in plain differentiable torch: for teachers that give only logits, and as a reference.

It holds several float32 copies of [s, b, v/tp]; where hidden states are at hand, use `losses.distillation_loss`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.loss.losses import LossSums, check_top_k, poison
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.top_k import NEVER
from nemo_minitron.distillation.loss.vocabulary import VocabShard, vocab_shard
from nemo_minitron.errors import InputError


def loss_on_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_mask: Tensor,
    settings: LossSettings,
    *,
    vocab_size: int,
    labels: Tensor | None = None,
) -> LossSums:
    """The loss of `losses.distillation_loss` where logits exist already.

    Args:
        student_logits: [s, b, v_s/tp], the rank's own columns; carries gradients.
        teacher_logits: [s, b, v_t/tp], likewise; no gradient flows.
        loss_mask: [b, s].
        settings: which loss.
        vocab_size: of both models' tokenizer, without padding.
        labels: next tokens [b, s], global; needed for a ce_weight above 0.

    Raises:
        InputError: the vocabulary is larger than the logits'; top_k is larger than it; the two are cut elsewhere over
            the tensor-parallel ranks (heads padded differently: `vocabulary.align_head` before the products helps).
    """
    shard = vocab_shard(student_logits.shape[-1], vocab_size)
    if vocab_shard(teacher_logits.shape[-1], vocab_size) != shard:
        raise InputError(
            f"teacher logits with {teacher_logits.shape[-1]} columns a rank, the student's with "
            f"{student_logits.shape[-1]}: padded differently; must be cut alike over the tensor-parallel ranks"
        )
    check_top_k(settings, vocab_size)
    student, teacher = (_Side.of(t, shard) for t in (student_logits, teacher_logits.detach()))
    assert labels is not None or not settings.ce_weight, "the cross-entropy needs labels"
    weight = loss_mask.t().to(student.logits.dtype)
    tokens, ce = weight.sum(dtype=torch.float32), None
    if labels is not None:
        weight = poison(weight, labels.t(), vocab_size)
        ce = (_cross_entropy(student, labels.t(), shard) * weight).sum()
    kd = (_divergence(student, teacher, settings, shard) * weight).sum()
    loss = kd + settings.ce_weight * ce if ce is not None and settings.ce_weight else kd
    return LossSums(loss, tokens, kd.detach(), None if ce is None else ce.detach())


@dataclass
class _Side:
    """Logits [s, b, columns] of the rank's true columns, and the largest of all ranks' [s, b, 1]."""

    logits: Tensor
    peak: Tensor

    @classmethod
    def of(cls, logits: Tensor, shard: VocabShard) -> "_Side":
        logits = logits[..., : shard.columns].to(torch.promote_types(logits.dtype, torch.float32))
        return cls(logits, _peak(logits))


def _peak(logits: Tensor) -> Tensor:
    lowest = logits.new_full((*logits.shape[:-1], 1), torch.finfo(logits.dtype).min)
    largest = torch.cat((logits.detach(), lowest), dim=-1).amax(-1, keepdim=True)
    return parallel.all_reduce(largest, "tp", "max")


def _sum(t: Tensor) -> Tensor:
    return parallel.sum_tp(t.sum(-1))


def _divergence(student: _Side, teacher: _Side, settings: LossSettings, shard: VocabShard) -> Tensor:
    """[s, b] nats, times T^2."""
    t = settings.temperature
    if settings.top_k is None:
        sides = (student.logits - student.peak) / t, (teacher.logits - teacher.peak) / t
        loss = _of_centred(*sides, settings)
    else:
        log_q, log_p = (x.log_softmax(-1) for x in _outcomes(student.logits, teacher.logits, settings, shard))
        loss = _of_log_probabilities(log_q, log_p, settings).sum(-1)
    return loss * t**2


def _of_centred(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """[s, b] from logits / T of this rank's columns, of which all ranks' largest is 0."""
    log_z_student, log_z_teacher = _sum(student.exp()).log(), _sum(teacher.exp()).log()
    if settings.divergence == "forward_kl":
        cross = _sum(teacher.exp() * (teacher - student))
        return cross / log_z_teacher.exp() - log_z_teacher + log_z_student
    if settings.divergence == "reverse_kl":
        cross = _sum(student.exp() * (student - teacher))
        return cross / log_z_student.exp() - log_z_student + log_z_teacher
    log_z_student = parallel.copy_tp(log_z_student)
    log_q, log_p = student - log_z_student[..., None], teacher - log_z_teacher[..., None]
    return _sum(_of_log_probabilities(log_q, log_p, settings))


def _of_log_probabilities(log_q: Tensor, log_p: Tensor, settings: LossSettings) -> Tensor:
    """Each outcome's part of the divergence."""
    if settings.divergence == "forward_kl":
        return log_p.exp() * (log_p - log_q)
    if settings.divergence == "reverse_kl":
        return log_q.exp() * (log_q - log_p)
    beta = settings.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _outcomes(student: Tensor, teacher: Tensor, settings: LossSettings, shard: VocabShard) -> list[Tensor]:
    """Student's and teacher's logits / T [s, b, k (+ 1)] of the teacher's k best tokens (and of all others)."""
    assert settings.top_k is not None
    columns, mine = _best(teacher, settings.top_k, shard)
    found = []
    for logits in (student, teacher):
        # A column to look at where another rank has the token.
        padded = torch.nn.functional.pad(logits, (0, 1))
        picked = parallel.sum_tp(torch.where(mine, padded.gather(-1, columns), 0))
        # By the largest of the outcomes, not of all logits: the k may lie so far below it that nothing of them is left.
        # Before the division by T, which would round what is large.
        peak = picked.detach().amax(-1, keepdim=True)
        if settings.tail:
            rest = logits.masked_fill(_is_at(columns, logits), NEVER)
            rest_peak = _peak(rest)
            peak = torch.maximum(peak, rest_peak)
            log_sum = _sum(((rest - rest_peak) / settings.temperature).exp()).log()[..., None]
            tail = (rest_peak - peak) / settings.temperature + log_sum
        outcomes = (picked - peak) / settings.temperature
        found.append(torch.cat((outcomes, tail), dim=-1) if settings.tail else outcomes)
    return found


def _best(teacher: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The k best tokens' columns [s, b, k] on this rank, one past the last where another rank has it; whether it is
    this one."""
    every = teacher.new_full((*teacher.shape[:-1], k), torch.finfo(teacher.dtype).min)
    values, columns = teacher.topk(min(k, shard.columns), dim=-1)
    every[..., : values.shape[-1]] = values
    candidates = torch.cat(parallel.all_gather_tp(every), dim=-1)
    places = candidates.topk(k, dim=-1).indices - parallel.tp_rank() * k
    mine = (places >= 0) & (places < columns.shape[-1])
    beyond = torch.nn.functional.pad(columns, (0, 1), value=shard.columns)
    return beyond.gather(-1, places.where(mine, columns.shape[-1])), mine


def _is_at(columns: Tensor, like: Tensor) -> Tensor:
    """[s, b, v], whether a column is among the given ones; one past the last marks nothing."""
    marked = torch.zeros(*like.shape[:-1], like.shape[-1] + 1, dtype=torch.bool, device=like.device)
    return marked.scatter_(-1, columns, True)[..., :-1]


def _cross_entropy(student: _Side, labels: Tensor, shard: VocabShard) -> Tensor:
    """[s, b] nats; without meaning where a label is no token."""
    columns = labels - shard.first
    mine = (columns >= 0) & (columns < shard.columns)
    centred = student.logits - student.peak
    padded = torch.nn.functional.pad(centred, (0, 1))
    label = torch.where(mine, padded.gather(-1, columns.where(mine, 0)[..., None])[..., 0], 0)
    return _sum(centred.exp()).log() - parallel.sum_tp(label)
