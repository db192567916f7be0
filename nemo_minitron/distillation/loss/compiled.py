"""Forward KL and cross-entropy for a device whose memory is what a loss waits for: read logits thrice, write once.

`divergences` keeps each step's result in memory, which is fast where a block of logits stays in a CPU's cache. Here
each reduction starts from the logits again, and `torch.compile` makes one kernel of each function below: nothing of a
block's size is written but the gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.loss.batched_collectives import Reductions
from nemo_minitron.distillation.loss.divergences import Divergence, NextToken


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Chunks of one size, and a last one that may be shorter: dynamic, so that the second size compiles nothing new.
    return torch.compile(function, dynamic=True)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiled on CUDA; as written elsewhere, which is how the tests without a GPU see it."""
    return (_compiled(function) if arguments[0].is_cuda else function)(*arguments)


def _peaks(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack((student.amax(1), teacher.amax(1)))


def _sums(student: Tensor, teacher: Tensor, peaks: Tensor, scale: float) -> Tensor:
    s, a = (student - peaks[0, :, None]) * scale, (teacher - peaks[1, :, None]) * scale
    weight = a.exp()
    return torch.stack((s.exp().sum(1), weight.sum(1), (weight * (a - s)).sum(1)))


def _gradient(
    student: Tensor, teacher: Tensor, peaks: Tensor, scale: float, of_student: Tensor, of_teacher: Tensor
) -> None:
    q = ((student - peaks[0, :, None]) * scale).exp()
    p = ((teacher - peaks[1, :, None]) * scale).exp()
    student.copy_(q * of_student[:, None] - p * of_teacher[:, None])


class RecomputingForwardKL(Divergence):
    """As `divergences.ForwardKL`; the teacher's logits are left as they are."""

    def steps(self) -> Reductions:
        """Find `per_token`: two reductions."""
        temperature = self.settings.temperature
        self._scale = 1 / temperature
        self._peak = yield "max", _run(_peaks, self.student, self.teacher)
        sums = yield "sum", _run(_sums, self.student, self.teacher, self._peak, self._scale)
        self._z_student, self._z_teacher, cross = sums
        kl = cross / self._z_teacher - self._z_teacher.log() + self._z_student.log()
        self.per_token = kl * temperature**2

    def write_gradient(self, weight: Tensor) -> None:
        """As the base class says."""
        weight = weight * self.settings.temperature
        _run(
            _gradient,
            self.student,
            self.teacher,
            self._peak,
            self._scale,
            weight / self._z_student,
            weight / self._z_teacher,
        )


def _centred_sum(student: Tensor, peak: Tensor) -> Tensor:
    return (student - peak[:, None]).exp().sum(1)


def _peak(student: Tensor) -> Tensor:
    return student.amax(1)


class ReportedNextToken(NextToken):
    """As `divergences.NextToken` where the cross-entropy is only reported: no gradient, and no memory for one."""

    def steps(self) -> Reductions:
        """Find `per_token` [n] in nats: two reductions."""
        peak = (yield "max", _run(_peak, self.student)[None])[0]
        label = torch.where(self._mine, self.student.gather(1, self._columns)[:, 0] - peak, 0)
        z, label = yield "sum", torch.stack((_run(_centred_sum, self.student, peak), label))
        self.per_token = z.log() - label
