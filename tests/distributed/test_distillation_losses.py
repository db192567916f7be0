"""Losses and gradients of a sharded vocabulary against one process in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron import parallel
from nemo_minitron.distillation import (
    HiddenTeacher,
    LossSettings,
    align_head,
    distillation_loss,
    loss_on_logits,
)
from nemo_minitron.errors import InputError
from tests.support.kd_problems import Expected, Problem, close, every_setting, expected, problem
from tests.support.ranks import layout


def shard(t: torch.Tensor) -> torch.Tensor:
    """The rank's part of dimension 0."""
    return t.chunk(parallel.tp_size())[parallel.tp_rank()].clone()


def check(p: Problem, loss: LossSettings, wanted: Expected, sp: bool, teacher=None, tolerance=1e-10) -> None:
    hidden = (shard(p.hidden) if sp else p.hidden.clone()).requires_grad_()
    head = shard(p.head).requires_grad_()
    if teacher is None:
        states = shard(p.teacher_hidden) if sp else p.teacher_hidden
        teacher = HiddenTeacher(states, align_head(shard(p.teacher_head), len(head), p.vocab_size))
    sums = distillation_loss(
        hidden,
        head,
        teacher,
        p.mask,
        loss,
        vocab_size=p.vocab_size,
        labels=p.labels,
        chunk_bytes=6 * 8 * p.vocab_size,
    )
    (sums.loss * 2).backward()
    assert sums.tokens == p.mask.sum()
    for name in ("loss", "kd", "ce"):
        close(getattr(sums, name), getattr(wanted, name), tolerance)
    close(hidden.grad, shard(wanted.hidden) if sp else wanted.hidden, tolerance)
    close(head.grad, shard(wanted.head), tolerance)


def sharded_losses(tp: int) -> None:
    torch.set_num_threads(1)
    # Padded alike; padded differently, so that shards begin elsewhere; all true tokens on the first rank.
    sizes = {"alike": (56, 56), "cut elsewhere": (56, 64), "padding only": (112, 200)}
    for sp in (False, True):
        layout(tp=tp, sp=sp)
        for padded, teacher_padded in sizes.values():
            p = problem(s=8, padded=padded, teacher_padded=teacher_padded)
            for loss in every_setting()[:: 1 if padded != teacher_padded else 3]:
                check(p, loss, expected(p, loss, upstream=2.0), sp)


def test_tensor_and_sequence_parallel(run_on_ranks):
    run_on_ranks(2, sharded_losses, 2)


def every_mask(tp: int) -> None:
    torch.set_num_threads(1)
    layout(tp=tp)
    p = problem(s=8)
    one_sequence = torch.ones_like(p.mask)
    one_sequence[1:] = 0
    masks = [torch.ones_like(p.mask), p.mask, p.mask * torch.tensor([[0.25], [1.5], [2.0]]), one_sequence]
    for mask, loss in itertools.product(masks, every_setting()):
        masked = replace(p, mask=mask)
        check(masked, loss, expected(masked, loss, upstream=2.0), sp=False)


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_loss_with_every_mask(run_on_ranks, tp):
    run_on_ranks(tp, every_mask, tp, timeout=300)


def test_four_ranks(run_on_ranks):
    run_on_ranks(4, four_ranks)


def four_ranks() -> None:
    layout(tp=4, sp=True)
    # The last rank has padding only; of the teacher's shards some cross two of the student's.
    p = problem(s=8, vocab_size=37, padded=48, teacher_padded=40)
    for loss in (LossSettings(), LossSettings("jensen_shannon", top_k=30, ce_weight=1.0)):
        check(p, loss, expected(p, loss, upstream=2.0), sp=True)
    layout(tp=2)
    check(p, LossSettings(), expected(p, LossSettings(), upstream=2.0), sp=False)


def cached_teacher() -> None:
    for sp in (False, True):
        layout(tp=2, sp=sp)
        p = problem(3, s=8)
        for loss in (
            LossSettings(),
            LossSettings(tail=False),
            LossSettings("reverse_kl", temperature=2.0, ce_weight=1),
        ):
            wanted = expected(p, replace(loss, top_k=5), upstream=2.0)
            check(p, loss, wanted, sp, p.cached(loss, 5))


def test_cached_top_k(run_on_ranks):
    run_on_ranks(2, cached_teacher)


def plain_form() -> None:
    layout(tp=2)
    for padded in (56, 112):
        p = problem(4, padded=padded, teacher_padded=padded)
        for loss in every_setting()[:: 1 if padded == 56 else 5]:
            wanted = expected(p, loss)
            hidden, head = p.hidden.clone().requires_grad_(), shard(p.head).requires_grad_()
            student, teacher = hidden @ head.T, p.teacher_hidden @ shard(p.teacher_head).T
            sums = loss_on_logits(student, teacher, p.mask, loss, vocab_size=50, labels=p.labels)
            sums.loss.backward()
            for name in ("loss", "kd", "ce"):
                close(getattr(sums, name), getattr(wanted, name), 1e-10)
            close(parallel.all_reduce(hidden.grad, "tp"), wanted.hidden, 1e-10)
            close(head.grad, shard(wanted.head), 1e-10)


def test_plain_form(run_on_ranks):
    run_on_ranks(2, plain_form)


def narrow() -> None:
    layout(tp=2, sp=True)
    for loss in (LossSettings(ce_weight=1.0), LossSettings("jensen_shannon", top_k=7)):
        p = problem(5, s=32, vocab_size=500, padded=512, teacher_padded=500)
        single = p.to(torch.float32)
        check(single, loss, expected(single, loss, upstream=2.0), sp=True, tolerance=1e-5)
        half = p.to(torch.bfloat16)
        wanted = expected(half, loss, upstream=2.0)
        # Hidden gradients are rounded on each rank, and once more when they are summed.
        check(half, loss, wanted, sp=True, tolerance=2**-6)


def test_float32_and_bfloat16(run_on_ranks):
    run_on_ranks(2, narrow)


def unaligned() -> None:
    layout(tp=2)
    p = problem(6, s=8)
    head = shard(p.head)
    with pytest.raises(InputError, match="the teacher's head shard has 32 rows, the student's 28"):
        distillation_loss(
            p.hidden,
            head,
            HiddenTeacher(p.teacher_hidden, shard(p.teacher_head)),
            p.mask,
            LossSettings(),
            vocab_size=50,
        )
    student, teacher = p.hidden @ head.T, p.teacher_hidden @ shard(p.teacher_head).T
    with pytest.raises(InputError, match="teacher logits with 32 columns a rank, the student's with 28"):
        loss_on_logits(student, teacher, p.mask, LossSettings(), vocab_size=50)


def test_shards_cut_elsewhere_are_refused(run_on_ranks):
    run_on_ranks(2, unaligned)


def data_parallel() -> list[torch.Tensor]:
    """Megatron's DDP over two context-parallel ranks: each has half of the tokens; the head's main_grad."""
    layout(cp=2)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    p = problem(7, s=8)
    half = slice(4 * parallel.cp_rank(), 4 * parallel.cp_rank() + 4)
    mine = replace(p, hidden=p.hidden[half], teacher_hidden=p.teacher_hidden[half]).to(torch.float32)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(mine.head)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, context_parallel_size=2)
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, average_in_collective=False), module
    )
    for _ in range(2):
        sums = distillation_loss(
            mine.hidden,
            module.weight,
            mine.teacher(),
            p.mask[:, half],
            LossSettings(),
            vocab_size=p.vocab_size,
        )
        sums.loss.backward()
    ddp.finish_grad_sync()
    # Megatron divides by the ranks of data and context parallelism.
    close(module.weight.main_grad * 2, 2 * expected(p, LossSettings()).head, 1e-5)
    return [parallel.all_reduce(sums.kd.clone(), "cp"), parallel.all_reduce(sums.tokens.clone(), "cp")]


def test_context_parallel_sums_and_ddp_gradients(run_on_ranks):
    p = problem(7, s=8)
    for kd, tokens in run_on_ranks(2, data_parallel):
        close(kd, expected(p, LossSettings()).kd, 1e-5)
        assert tokens == p.mask.sum()


def random_shapes(cases: list[tuple[dict[str, int], LossSettings]]) -> None:
    layout(tp=2)
    for sizes, loss in cases:
        p = problem(**sizes)
        check(p, loss, expected(p, loss, upstream=2.0), sp=False, tolerance=1e-9)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, int], LossSettings]:
    vocab_size = draw(st.integers(2, 40))
    padded, teacher_padded = (2 * -(-(vocab_size + draw(st.integers(0, 30))) // 2) for _ in range(2))
    sizes = {"s": draw(st.integers(1, 6)), "b": draw(st.integers(1, 3)), "vocab_size": vocab_size}
    divergence = draw(st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"]))
    top_k = draw(st.none() | st.integers(1, vocab_size - 1))
    loss = LossSettings(divergence, top_k=top_k, tail=draw(st.booleans()), ce_weight=draw(st.integers(0, 1)))
    return {**sizes, "padded": padded, "teacher_padded": teacher_padded}, loss


@settings(deadline=None, max_examples=5)
@given(cases=st.lists(shapes(), min_size=8, max_size=8))
def test_any_shape(run_on_ranks, cases):
    run_on_ranks(2, random_shapes, cases)
