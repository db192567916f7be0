"""Distillation problems as global float64 tensors, and what the reference makes of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron.distillation import HiddenTeacher, LossSettings, TopKTeacher
from tests.support.kd_reference import loss_sums


@dataclass
class Problem:
    """Global tensors: hidden states [s, b, h], heads [v_padded, h], mask and labels [b, s]."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    mask: Tensor
    labels: Tensor
    vocab_size: int

    def to(self, dtype: torch.dtype) -> "Problem":
        names = ("hidden", "head", "teacher_hidden", "teacher_head")
        return replace(self, **{name: getattr(self, name).detach().to(dtype, copy=True) for name in names})

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's [s, b, vocab_size]."""
        student = self.hidden @ self.head[: self.vocab_size].T
        return student, self.teacher_hidden @ self.teacher_head[: self.vocab_size].T

    def teacher(self) -> HiddenTeacher:
        return HiddenTeacher(self.teacher_hidden, self.teacher_head)

    def cached(self, settings: LossSettings, k: int) -> TopKTeacher:
        """The teacher's k best tokens, found with plain torch."""
        logits = self.logits()[1].double()
        values, indices = logits.topk(k, dim=-1)
        rest = logits.scatter(-1, indices, -torch.inf) / settings.temperature
        return TopKTeacher(values.to(self.hidden.dtype), indices, rest.logsumexp(-1))


def problem(
    seed: int = 0,
    s: int = 7,
    b: int = 3,
    vocab_size: int = 50,
    padded: int = 56,
    teacher_padded: int = 64,
    scale: float = 1.0,
) -> Problem:
    """Random; logits of a standard deviation of about 3 times `scale`. Padding rows are large, lest it pass unnoticed
    when they count. A third of the tokens is masked."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    head, teacher_head = randn(padded, 8), randn(teacher_padded, 12)
    head[vocab_size:] *= 5
    teacher_head[vocab_size:] *= 5
    mask = (torch.rand(b, s, generator=g) > 0.33).float()
    labels = torch.randint(0, vocab_size, (b, s), generator=g)
    return Problem(
        randn(s, b, 8) * scale, head, randn(s, b, 12) * scale, teacher_head, mask, labels, vocab_size
    )


@dataclass
class Expected:
    loss: Tensor
    kd: Tensor
    ce: Tensor
    hidden: Tensor
    head: Tensor


def expected(p: Problem, settings: LossSettings, upstream: float = 1.0) -> Expected:
    """Losses, and the gradients of upstream * loss, in float64 from whatever precision the problem is in."""
    p = p.to(torch.float64)
    p.hidden.requires_grad_()
    p.head.requires_grad_()
    loss, kd, ce = loss_sums(*p.logits(), p.mask.double(), labels=p.labels, **vars(settings))
    hidden, head = torch.autograd.grad(upstream * loss, (p.hidden, p.head))
    return Expected(loss.detach(), kd.detach(), ce.detach(), hidden, head)


def every_setting() -> list[LossSettings]:
    """Each divergence with each temperature, each top-k and with or without cross-entropy."""
    return [
        LossSettings(divergence, 0.3, temperature, top_k, tail, ce_weight)
        for divergence in ("forward_kl", "reverse_kl", "jensen_shannon")
        for temperature in (1.0, 2.5, 0.7)
        for top_k, tail in ((None, True), (5, True), (5, False))
        for ce_weight in (0.0, 0.7)
    ]


def close(found: Tensor | None, wanted: Tensor, tolerance: float) -> None:
    """Assert equality to `tolerance` relative to the largest entry."""
    assert found is not None
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max().clamp(min=1e-3), float(error / wanted.abs().max())
