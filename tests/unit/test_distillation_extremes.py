"""Every form of the loss on logits far apart and at temperatures far from 1, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.distillation import (
    HiddenTeacher,
    LossSettings,
    TopKTeacher,
    distillation_loss,
    loss_on_logits,
)
from nemo_minitron.distillation.cache.top_k_logits import most_probable
from tests.support.kd_reference import loss_sums

PLAIN, FUSED, CACHED = "plain", "fused", "cached"


def found(form: str, student, teacher, mask, labels, loss: LossSettings):
    """(loss, kd, ce, gradient of the logits) of logits [s, b, v]."""
    logits, v = student.clone().requires_grad_(), student.shape[-1]
    if form == PLAIN:
        sums = loss_on_logits(logits, teacher, mask, loss, vocab_size=v, labels=labels)
    else:
        # With a head of ones on the diagonal the logits are the hidden states, exactly.
        head = torch.eye(v, dtype=student.dtype)
        rows = HiddenTeacher(teacher, head) if form == FUSED else cached(teacher, head, loss)
        sums = distillation_loss(logits, head, rows, mask, loss, vocab_size=v, labels=labels)
    (gradient,) = torch.autograd.grad(sums.loss, logits)
    return sums.loss, sums.kd, sums.ce, gradient


def cached(teacher, head, loss: LossSettings) -> TopKTeacher:
    """As `recipes/cache_teacher.py` finds it and distillation reads it."""
    found = most_probable(teacher.flatten(0, 1), head, loss.top_k, loss.temperature, vocab_size=len(head))
    values, indices, tail = (t.unflatten(0, teacher.shape[:2]) for t in found.values())
    return TopKTeacher(values, indices, tail if loss.tail else None)


def wanted(student, teacher, mask, labels, loss: LossSettings):
    logits = student.double().requires_grad_()
    sums = loss_sums(logits, teacher.double(), mask.double(), labels=labels, **vars(loss))
    (gradient,) = torch.autograd.grad(sums[0], logits)
    return *sums, gradient


def check(form: str, problem, loss: LossSettings) -> None:
    tolerance = 1e-5 if problem[0].dtype == torch.float32 else 1e-11  # the reference divides by T first
    t, nats = loss.temperature, 1.0
    if loss.divergence == "reverse_kl":
        # Its gradient is q times the difference of two numbers of up to this size.
        nats += float(max(side.amax() - side.amin() for side in problem[:2])) / t
    sizes = {"loss": max(1, nats * t**2), "kd": nats * t**2, "ce": 1, "gradient": max(1, nats * t)}
    for (name, size), got, want in zip(
        sizes.items(), found(form, *problem, loss), wanted(*problem, loss), strict=True
    ):
        got, want = got.detach(), want.detach()
        assert got.isfinite().all(), name
        error = (got.double() - want).abs().max()
        assert error <= tolerance * max(size, want.abs().max()), (name, float(error), float(want.abs().max()))


@st.composite
def problems(draw, dtype):
    """(student, teacher, mask, labels); a part of the logits is lowered by a gap, another on each side."""
    v = draw(st.integers(2, 12))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    sides = []
    for _ in range(2):
        logits = torch.randn(3, 2, v, generator=g, dtype=torch.float64) * draw(
            st.sampled_from([0.01, 1.0, 5.0])
        )
        lowered = torch.rand(3, 2, v, generator=g) < 0.5
        logits -= lowered * draw(st.sampled_from([0.0, 1.0, 20.0, 400.0, 10_000.0]))
        sides.append((logits + draw(st.sampled_from([0.0, 50.0, -3000.0]))).to(dtype))
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.5, 1.0]])
    return *sides, mask, torch.randint(0, v, (2, 3), generator=g)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (PLAIN, torch.float32),
        (PLAIN, torch.float64),
        (FUSED, torch.float32),
        (FUSED, torch.float64),
        # What is cached is float32.
        (CACHED, torch.float32),
    ],
)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_gap_and_temperature(form, dtype, data):
    problem = data.draw(problems(dtype))
    v = problem[0].shape[-1]
    loss = LossSettings(
        data.draw(st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"])),
        beta=data.draw(st.sampled_from([0.02, 0.5, 0.9])),
        temperature=data.draw(st.sampled_from([0.05, 0.1, 0.5, 1.0, 3.0, 10.0])),
        # With all tokens among the k there is no tail, whose reference would be log 0.
        top_k=data.draw(st.integers(1, v - 1) if form == CACHED else st.none() | st.integers(1, v - 1)),
        tail=data.draw(st.booleans()),
        ce_weight=data.draw(st.sampled_from([0.0, 1.0])),
    )
    check(form, problem, loss)


@pytest.mark.parametrize("form", [PLAIN, FUSED, CACHED])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("tail", [True, False])
def test_the_teachers_best_tokens_are_the_students_worst(form, divergence, tail):
    student = torch.tensor([0.0, -20.0, -20.3, -21.0, -1.0]).expand(1, 1, 5).contiguous()
    teacher = torch.tensor([-20.0, 0.0, -0.5, -0.2, -19.0]).expand(1, 1, 5).contiguous()
    problem = student, teacher, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    check(form, problem, LossSettings(divergence, temperature=0.1, top_k=3, tail=tail))


@pytest.mark.parametrize("form", [PLAIN, FUSED])
def test_a_mixture_that_one_side_is_nearly_all_of(form):
    student = torch.tensor([0.0, 0.01]).expand(1, 1, 2).contiguous()
    teacher = torch.tensor([0.0, -400.0]).expand(1, 1, 2).contiguous()
    problem = student, teacher, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    check(form, problem, LossSettings("jensen_shannon", 0.02, temperature=0.05))
