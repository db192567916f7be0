"""Output layers, loss and gradients in one pass over chunks of tokens: logits exist for one chunk at a time.

Shapes: N = s * b tokens, n those of a chunk, v the rank's columns of the true vocabulary, h and h_t hidden sizes.
The idea of forming gradients in the forward pass is that of Liger Kernel (arXiv 2410.10989, section 3.2); here it is
vocabulary-parallel, and on two models' hidden states.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.loss.batched_collectives import reduce_over_tp, run_in_step
from nemo_minitron.distillation.loss.compiled import RecomputingForwardKL, ReportedNextToken
from nemo_minitron.distillation.loss.divergences import Divergence, NextToken, Scratch, divergence
from nemo_minitron.distillation.loss.matmul import (
    add_head_gradient,
    gradient_operand,
    is_wide,
    write_hidden_gradient,
    write_logits,
)
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.top_k import NEVER, TopKDivergence, TopKRows
from nemo_minitron.distillation.loss.vocabulary import VocabShard

_MIB = 1 << 20
# More tokens at once make no faster products on a CPU, whose caches hold a few rows' passes over the vocabulary.
_CPU_TOKENS, _CPU_BLOCK_BYTES = 256, 4 * _MIB


@dataclass(frozen=True)
class HiddenRows:
    """A live teacher: hidden states [N, h_t] and the rows [v, h_t] of its head that are this rank's."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Job:
    """All that the pass needs beside the student's hidden states and head.

    Attributes:
        teacher: see the classes.
        weight: loss mask [N], float.
        columns: of the labels among this rank's, -1 where another rank has it, int64 [N]; None without labels.
        settings: which loss.
        shard: which tokens the rank's columns are.
        chunk_tokens: most tokens at once.
        whole_sequence: the given hidden states are the whole [s, b, h], not the rank's part under sequence parallelism.
    """

    teacher: HiddenRows | TopKRows
    weight: Tensor
    columns: Tensor | None
    settings: LossSettings
    shard: VocabShard
    chunk_tokens: int
    whole_sequence: bool


@dataclass
class Outcome:
    """Sums [] over tokens, and the gradients of the loss (float32 for 16-bit heads), None where unwanted."""

    kd: Tensor
    ce: Tensor
    hidden_gradient: Tensor | None
    head_gradient: Tensor | None


def default_chunk_bytes(device: torch.device) -> int:
    """Bytes of the logits buffers of one chunk."""
    # Each chunk adds to the whole head gradient: on CUDA that traffic wants more tokens at once.
    return (1024 if device.type == "cuda" else 256) * _MIB


def chunk_tokens(
    tokens: int, columns: int, buffers: int, itemsize: int, budget: int, device: torch.device
) -> int:
    """Tokens of a chunk whose logits [n, columns] fit `budget` bytes that many times over; chunks of like size."""
    most = max(1, budget // max(1, columns * buffers * itemsize))
    if device.type == "cpu":
        most = min(most, _CPU_TOKENS)
    return -(-tokens // -(-tokens // most)) if tokens else 1


class _Pass:
    """One walk over all chunks; hidden [N, h], head [v_padded/tp, h]."""

    def __init__(self, job: Job, hidden: Tensor, head: Tensor, want_hidden: bool, want_head: bool) -> None:
        self.job, self.hidden, self.head = job, hidden, head
        self.want = want_hidden or want_head
        self.dtype = torch.promote_types(head.dtype, torch.float32)
        self.true_head = head[: job.shard.columns]
        self.width = max(job.shard.columns, 1)
        self.hidden_gradient = torch.empty_like(hidden) if want_hidden else None
        # Zeros where nothing will be written: padding, or no token at all.
        self.head_gradient = head.new_empty(head.shape, dtype=self.dtype) if want_head else None
        if self.head_gradient is not None:
            self.head_gradient[job.shard.columns if len(hidden) else 0 :].zero_()
        self.sums = torch.zeros(2, dtype=torch.float64, device=head.device)
        self._allocate()

    def _allocate(self) -> None:
        self.student = self.head.new_empty(self.job.chunk_tokens, self.width, dtype=self.dtype)
        live = isinstance(self.job.teacher, HiddenRows)
        narrow_cuda = self.head.is_cuda and not is_wide(self.head.dtype)
        self.teacher = torch.empty_like(self.student) if live or (narrow_cuda and self.want) else None
        self.block = self.job.chunk_tokens
        if self.head.device.type == "cpu" and parallel.tp_size() == 1:
            # Not below 2 rows: torch 2.13 reduces a single one far more slowly.
            rows = max(2, _CPU_BLOCK_BYTES // (self.width * self.student.element_size()))
            self.block = min(self.block, rows)
        self.scratch = Scratch(self.block, self.width, self.dtype, self.head.device)

    def run(self) -> Outcome:
        for begin in range(0, len(self.hidden), self.job.chunk_tokens):
            rows = slice(begin, min(begin + self.job.chunk_tokens, len(self.hidden)))
            self._write_logits(rows)
            for first in range(rows.start, rows.stop, self.block):
                block = slice(first, min(first + self.block, rows.stop))
                self._lose(block, slice(block.start - begin, block.stop - begin))
            if self.want:
                self._write_gradients(rows)
        kd, ce = self.sums.to(self.dtype)
        return Outcome(kd, ce, self.hidden_gradient, self.head_gradient)

    def _write_logits(self, rows: slice) -> None:
        count, teacher = rows.stop - rows.start, self.job.teacher
        if not self.job.shard.columns:
            # A rank that holds padding only takes part with one token that is never said.
            self.student.fill_(NEVER)
            if self.teacher is not None:
                self.teacher.fill_(NEVER)
            return
        write_logits(self.student[:count], self.hidden[rows], self.true_head)
        if isinstance(teacher, HiddenRows):
            assert self.teacher is not None
            write_logits(self.teacher[:count], teacher.hidden[rows], teacher.head)

    def _lose(self, tokens: slice, place: slice) -> None:
        """Add the block's loss; leave the gradient with respect to its logits in `student`."""
        weight, ce_weight = self.job.weight[tokens], self.job.settings.ce_weight
        student = self.student[place]
        kd = self._divergence(student, tokens, place)
        parts = [kd.steps()]
        ce = None
        if self.job.columns is not None:
            ce = self._next_token(student, self.job.columns[tokens])
            parts.insert(0, ce.steps())
        run_in_step(parts, reduce_over_tp)
        self.sums[0] += (kd.per_token * weight).sum(dtype=torch.float64)
        if ce is not None:
            self.sums[1] += (ce.per_token * weight).sum(dtype=torch.float64)
        if self.want:
            kd.write_gradient(weight)
            if ce is not None and ce_weight:
                ce.add_gradient(weight * ce_weight)

    def _next_token(self, student: Tensor, columns: Tensor) -> NextToken:
        needs_gradient = self.want and self.job.settings.ce_weight
        if student.is_cuda and not needs_gradient:
            return ReportedNextToken(student, columns, student)
        return NextToken(student, columns, self.scratch.take(2 if needs_gradient else 0, len(student)))

    def _divergence(self, student: Tensor, tokens: slice, place: slice) -> Divergence | TopKDivergence:
        teacher, settings, shard = self.job.teacher, self.job.settings, self.job.shard
        if isinstance(teacher, TopKRows):
            tail = None if teacher.tail is None else teacher.tail[tokens]
            rows = TopKRows(teacher.values[tokens].to(self.dtype), teacher.indices[tokens], tail)
            return TopKDivergence(student, rows, settings, shard, len(self.head))
        assert self.teacher is not None
        if settings.top_k is not None:
            return TopKDivergence(student, self.teacher[place], settings, shard, len(self.head))
        if student.is_cuda and settings.divergence == "forward_kl":
            return RecomputingForwardKL(student, self.teacher[place], settings, self.scratch)
        return divergence(student, self.teacher[place], settings, self.scratch)

    def _write_gradients(self, rows: slice) -> None:
        count, hidden = rows.stop - rows.start, self.hidden[rows]
        if not self.job.shard.columns:
            if self.hidden_gradient is not None:
                self.hidden_gradient[rows] = 0
            return
        spare = self.student if self.teacher is None else self.teacher
        gradient = gradient_operand(self.student[:count], spare, self.head.dtype)
        if self.hidden_gradient is not None:
            write_hidden_gradient(self.hidden_gradient[rows], gradient, self.true_head)
        if self.head_gradient is not None:
            columns = self.head_gradient[: self.job.shard.columns]
            add_head_gradient(columns, gradient, hidden, first=rows.start == 0)


def fused_pass(job: Job, hidden: Tensor, head: Tensor, want_hidden: bool, want_head: bool) -> Outcome:
    """Run the pass without autograd.

    Args:
        job: see there.
        hidden: [s, b, h], or [s/tp, b, h] where not `job.whole_sequence`; its gradient has the same shape.
        head: [v_padded/tp, h], the rank's own.
        want_hidden: form the gradient with respect to hidden, summed over the tensor-parallel ranks.
        want_head: form that of the head.
    """
    whole = hidden if job.whole_sequence else parallel.gather_sequence(hidden)
    outcome = _Pass(job, whole.flatten(0, 1).contiguous(), head, want_hidden, want_head).run()
    if outcome.hidden_gradient is not None:
        gradient = outcome.hidden_gradient.view(whole.shape)
        if job.whole_sequence:
            outcome.hidden_gradient = parallel.all_reduce(gradient, "tp")
        else:
            outcome.hidden_gradient = parallel.reduce_scatter_sequence(gradient)
    return outcome


class FusedLoss(torch.autograd.Function):
    """(hidden, head, job) -> (loss, kd, ce): the loss carries gradients, which were formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        want_hidden, want_head = ctx.needs_input_grad[:2]
        outcome = fused_pass(job, hidden, head, want_hidden, want_head)
        ctx.gradients = outcome.hidden_gradient, outcome.head_gradient, head.dtype
        ctx.mark_non_differentiable(outcome.kd, outcome.ce)
        return outcome.kd + job.settings.ce_weight * outcome.ce, outcome.kd, outcome.ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients by that of the loss."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the fused loss scales its gradients in place: run backward through it only once"
            )
        hidden, head, head_dtype = ctx.gradients
        ctx.gradients = None
        hidden = None if hidden is None else hidden.mul_(upstream)
        head = None if head is None else head.mul_(upstream).to(head_dtype)
        return hidden, head, None
