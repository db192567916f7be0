"""Losses and gradients on one rank against float64, and what they allocate."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_minitron.distillation import (
    HiddenTeacher,
    LossSettings,
    TopKTeacher,
    align_head,
    distillation_loss,
    loss_on_logits,
    shared_vocab_size,
)
from nemo_minitron.errors import InputError
from tests.support.kd_problems import Problem, close, every_setting, expected, problem

# The budget of a chunk of 5 tokens, so that 21 tokens end with a smaller one of 1.
CHUNK = 6 * 2 * 4 * 50


def run(p: Problem, loss: LossSettings, teacher=None, upstream=1.0, chunk_bytes=CHUNK, labels=True):
    """(sums, gradient of hidden, gradient of head)."""
    hidden, head = p.hidden.clone().requires_grad_(), p.head.clone().requires_grad_()
    sums = distillation_loss(
        hidden,
        head,
        teacher or p.teacher(),
        p.mask,
        loss,
        vocab_size=p.vocab_size,
        labels=p.labels if labels else None,
        chunk_bytes=chunk_bytes,
    )
    (sums.loss * upstream).backward()
    return sums, hidden.grad, head.grad


def check(p: Problem, loss: LossSettings, found, tolerance: float, upstream=1.0) -> None:
    sums, hidden, head = found
    wanted = expected(p, loss, upstream)
    assert sums.tokens == p.mask.sum()
    for name in ("loss", "kd", "ce"):
        close(getattr(sums, name), getattr(wanted, name), tolerance)
    close(hidden, wanted.hidden, tolerance)
    close(head, wanted.head, tolerance)
    assert not head[p.vocab_size :].any()


@pytest.mark.parametrize("loss", every_setting(), ids=str)
def test_values_and_gradients(loss):
    exact = problem()
    check(exact, loss, run(exact, loss, upstream=-0.3), 1e-10, upstream=-0.3)
    for mask in (torch.ones_like(exact.mask), exact.mask * 0.5):
        single = replace(exact, mask=mask).to(torch.float32)
        check(single, loss, run(single, loss), 1e-5)


@pytest.mark.parametrize("loss", every_setting(), ids=str)
def test_plain_form(loss):
    p = problem(1)
    p.hidden.requires_grad_()
    p.head.requires_grad_()
    student, teacher = p.hidden @ p.head.T, p.teacher_hidden @ p.teacher_head.T
    sums = loss_on_logits(student, teacher, p.mask, loss, vocab_size=p.vocab_size, labels=p.labels)
    found = torch.autograd.grad(sums.loss, (p.hidden, p.head))
    check(p, loss, (sums, *found), 1e-10)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", [True, False])
def test_cached_top_k(divergence, temperature, tail):
    p = problem(2)
    loss = LossSettings(divergence, 0.4, temperature, tail=tail, ce_weight=0.5)
    found = run(p, loss, p.cached(loss, 5))
    check(p, replace(loss, top_k=5), found, 1e-10)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_shape(data):
    vocab_size = data.draw(st.integers(2, 40))
    p = problem(
        data.draw(st.integers(0, 100)),
        s=data.draw(st.integers(1, 9)),
        b=data.draw(st.integers(1, 4)),
        vocab_size=vocab_size,
        padded=vocab_size + data.draw(st.integers(0, 9)),
        teacher_padded=vocab_size + data.draw(st.integers(0, 9)),
        # Logits of up to some hundreds: exponentials must not overflow.
        scale=data.draw(st.sampled_from([0.01, 1.0, 30.0])),
    )
    loss = LossSettings(
        data.draw(st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"])),
        beta=data.draw(st.sampled_from([0.1, 0.5, 0.9])),
        temperature=data.draw(st.sampled_from([0.5, 1.0, 4.0])),
        # With all tokens among the k there is no tail, whose reference would be log 0.
        top_k=data.draw(st.none() | st.integers(1, vocab_size - 1)),
        tail=data.draw(st.booleans()),
        ce_weight=data.draw(st.sampled_from([0.0, 1.0])),
    )
    budget = data.draw(st.integers(1, 40)) * 16 * vocab_size
    check(p, loss, run(p, loss, chunk_bytes=budget), 1e-8)


def test_top_k_of_the_whole_vocabulary_is_the_full_loss():
    p = problem(3)
    full = expected(p, LossSettings(temperature=2.0))
    for tail in (True, False):
        sums, hidden, _ = run(p, LossSettings(temperature=2.0, top_k=p.vocab_size, tail=tail))
        close(sums.kd, full.kd, 1e-9)
        close(hidden, full.hidden, 1e-9)


@pytest.mark.parametrize("loss", [LossSettings(ce_weight=0.3), LossSettings(top_k=4, temperature=2.0)])
def test_chunks_do_not_matter(loss):
    p = problem(4, s=70).to(torch.float32)
    base = run(p, loss, chunk_bytes=None)
    for tokens in (1, 2, 13, 209, 10**6):
        sums, hidden, head = run(p, loss, chunk_bytes=tokens * 2 * 4 * p.vocab_size)
        close(sums.loss, base[0].loss.detach(), 1e-6)
        close(hidden, base[1], 1e-5)
        close(head, base[2], 1e-5)


@pytest.mark.parametrize("loss", every_setting()[::5], ids=str)
def test_bfloat16_is_summed_in_float32(loss):
    # A vocabulary of more rows than are widened at once, and many tokens: sums kept in bfloat16 would be 1 % off.
    p = problem(5, s=40, vocab_size=4500, padded=4608, teacher_padded=4500).to(torch.bfloat16)
    sums, hidden, head = run(p, loss, chunk_bytes=None)
    assert hidden.dtype == head.dtype == torch.bfloat16
    assert sums.loss.dtype == torch.float32
    wanted = expected(p, loss)
    close(sums.loss, wanted.loss, 1e-5)
    # One rounding to bfloat16's 8 bits at the end.
    close(hidden, wanted.hidden, 2**-8)
    close(head, wanted.head, 2**-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("top_k", [None, 6])
def test_a_copy_of_the_teacher_loses_nothing(divergence, top_k):
    p = problem(6).to(torch.float32)
    copy = HiddenTeacher(p.hidden, p.head)
    sums, hidden, head = run(p, LossSettings(divergence, temperature=2.0, top_k=top_k), copy)
    assert abs(float(sums.kd)) < 1e-6 * float(sums.tokens)
    assert hidden.abs().max() < 1e-6
    assert head.abs().max() < 1e-6


def test_a_tied_head_gets_both_gradients():
    p = problem(7)
    weight = p.head.clone().requires_grad_()
    loss = LossSettings()

    def hidden(w):
        return torch.tanh(w[p.labels.T])

    sums = distillation_loss(hidden(weight), weight, p.teacher(), p.mask, loss, vocab_size=p.vocab_size)
    sums.loss.backward()
    tied = expected(replace(p, hidden=hidden(p.head)), loss)
    through = p.head.clone().requires_grad_()
    hidden(through).backward(tied.hidden)
    close(weight.grad, tied.head + through.grad, 1e-10)


def test_only_wanted_gradients_are_formed():
    p, loss = problem(8), LossSettings()
    wanted = expected(p, loss)
    for name, other in itertools.permutations(("hidden", "head")):
        tensors = {name: getattr(p, name).clone().requires_grad_(), other: getattr(p, other)}
        sums = distillation_loss(
            tensors["hidden"], tensors["head"], p.teacher(), p.mask, loss, vocab_size=p.vocab_size
        )
        sums.loss.backward()
        close(tensors[name].grad, getattr(wanted, name), 1e-10)
    with torch.no_grad():
        head = p.head.clone().requires_grad_()
        sums = distillation_loss(
            p.hidden, head, p.teacher(), p.mask, loss, vocab_size=p.vocab_size, labels=p.labels
        )
    assert not sums.loss.requires_grad
    close(sums.loss, wanted.loss, 1e-10)
    close(sums.ce, wanted.ce, 1e-10)


def test_reported_parts_carry_no_gradient_and_backward_runs_once():
    p = problem(9)
    hidden = p.hidden.clone().requires_grad_()
    sums = distillation_loss(
        hidden, p.head, p.teacher(), p.mask, LossSettings(), vocab_size=p.vocab_size, labels=p.labels
    )
    assert not sums.kd.requires_grad
    assert not sums.ce.requires_grad
    sums.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        sums.loss.backward()


class _Largest(TorchDispatchMode):
    """The largest storage, in elements, that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("loss", every_setting()[::7], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(loss, dtype):
    largest = []
    for s in (64, 512):
        p = problem(10, s=s, b=1, vocab_size=1000, padded=1024, teacher_padded=1000).to(dtype)
        with _Largest() as seen:
            run(p, loss, chunk_bytes=16 * 2 * 4 * 1024)
        largest.append(seen.elements)
    # The chunk's logits, or the head (12 columns); 512 tokens' hidden states are smaller.
    assert largest[0] == largest[1] <= 16 * 1024


def test_masked_tokens_may_hold_anything():
    p = problem(11)
    loss = LossSettings(ce_weight=1.0)
    base = run(p, loss)
    labels = torch.where(p.mask > 0, p.labels, -100)
    hidden = torch.where(p.mask.T[:, :, None] > 0, p.hidden, 17.0)
    other = run(replace(p, labels=labels, hidden=hidden), loss)
    assert torch.equal(base[0].loss, other[0].loss)
    assert torch.equal(base[2], other[2])
    nothing = run(replace(p, mask=torch.zeros_like(p.mask)), loss)
    assert nothing[0].loss == 0
    assert not nothing[2].any()


@pytest.mark.parametrize("label", [-100, 50])
def test_an_unmasked_label_that_is_no_token_makes_the_loss_nan(label):
    p = problem(12)
    first = tuple(p.mask.nonzero()[0])
    p.labels[first] = label
    assert run(p, LossSettings(ce_weight=1.0))[0].loss.isnan()
    student, teacher = p.logits()
    plain = loss_on_logits(student, teacher, p.mask, LossSettings(), vocab_size=50, labels=p.labels)
    assert plain.loss.isnan()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl': must be one of forward_kl, reverse_kl, jensen_shannon"),
        ({"beta": 1.0}, "beta 1.0: must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature 0.0: must be"),
        ({"temperature": float("inf")}, "temperature inf: must be"),
        ({"top_k": 0}, "top_k 0: must be at least 1"),
        ({"ce_weight": -1.0}, "ce_weight -1.0: must be"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        LossSettings(**values)


def test_bad_vocabularies_are_refused():
    p = problem(13)
    with pytest.raises(InputError, match="teacher's vocabulary has 7 tokens, the student's 8"):
        shared_vocab_size(8, 7)
    assert shared_vocab_size(8, 8) == 8
    with pytest.raises(InputError, match="vocabulary of 60 tokens: the output layer has 56 rows"):
        run(replace(p, vocab_size=60), LossSettings())
    with pytest.raises(InputError, match="vocabulary of 70 tokens: the output layer has 64 rows"):
        align_head(p.teacher_head, 80, 70)
    with pytest.raises(InputError, match="the teacher's head shard has 40 rows, the student's 56 with 50"):
        run(p, LossSettings(), HiddenTeacher(p.teacher_hidden, p.teacher_head[:40]))
    with pytest.raises(InputError, match="top_k 51: must be at most 50"):
        run(p, LossSettings(top_k=51))
    with pytest.raises(InputError, match="top_k 51: must be at most 50"):
        loss_on_logits(*p.logits(), p.mask, LossSettings(top_k=51), vocab_size=50)
    assert torch.equal(align_head(p.teacher_head, 56, 50), p.teacher_head[:50])


def test_a_cache_that_does_not_fit_is_refused():
    p = problem(14)
    cached = p.cached(LossSettings(), 5)
    with pytest.raises(InputError, match="top_k 6: the cached teacher has 5 tokens"):
        run(p, LossSettings(top_k=6), cached)
    with pytest.raises(InputError, match="tail true: the cached teacher has no tail"):
        run(p, LossSettings(), TopKTeacher(cached.values, cached.indices))
