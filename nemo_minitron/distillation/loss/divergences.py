"""Divergences between two vocabulary-parallel softmaxes, and their gradients, in place on a block of logits.

Shapes: n tokens of the block, v the rank's columns. Each class takes the logits of student and teacher [n, v] (float32
or float64, both overwritten), yields its reductions from `steps`, then holds `per_token` [n] (nats, times T^2), and
`write_gradient` leaves in the student's tensor the gradient with respect to its logits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.distillation.loss.batched_collectives import Reductions
from nemo_minitron.distillation.loss.settings import LossSettings


class Scratch:
    """Buffers of [rows, columns] in the logits' dtype, each allocated when first used and kept."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = rows, columns
        self._dtype, self._device = dtype, device
        self._buffers: dict[int, Tensor] = {}

    def take(self, number: int, rows: int) -> Tensor:
        """The first `rows` rows of a buffer; what they hold is undefined."""
        if number not in self._buffers:
            self._buffers[number] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._buffers[number][:rows]


class Divergence(ABC):
    """One of the divergences on one block; see the module's docstring.

    Args:
        student: logits [n, v] of this rank's columns, not yet divided by T.
        teacher: likewise.
        settings: its divergence, beta and temperature are read.
        scratch: of [>= n, v].
    """

    def __init__(self, student: Tensor, teacher: Tensor, settings: LossSettings, scratch: Scratch) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self._scratch = scratch
        self.per_token: Tensor

    @property
    def _work(self) -> Tensor:
        """[n, v], the same at every call."""
        return self._scratch.take(0, len(self.student))

    @abstractmethod
    def steps(self) -> Reductions:
        """Find `per_token`."""

    @abstractmethod
    def write_gradient(self, weight: Tensor) -> None:
        """Overwrite `student` with the gradient of sum(weight * per_token); weight [n]."""

    def _centre(self) -> Reductions:
        """Divide by T, with the largest logit of each token at 0."""
        student, teacher, temperature = self.student, self.teacher, self.settings.temperature
        peaks = yield "max", torch.stack((student.amax(1), teacher.amax(1)))
        student.sub_(peaks[0, :, None])
        teacher.sub_(peaks[1, :, None])
        if temperature != 1:
            student.mul_(1 / temperature)
            teacher.mul_(1 / temperature)


class ForwardKL(Divergence):
    """KL(p || q) = sum p (a - s) - log Z_a + log Z_s; its gradient is q - p."""

    def steps(self) -> Reductions:
        """Find `per_token`: two reductions."""
        yield from self._centre()
        student, teacher = self.student, self.teacher
        difference = torch.sub(teacher, student, out=self._work)
        teacher.exp_()
        student.exp_()
        difference.mul_(teacher)
        sums = torch.stack((student.sum(1), teacher.sum(1), difference.sum(1)))
        self._z_student, self._z_teacher, cross = yield "sum", sums
        kl = cross / self._z_teacher - self._z_teacher.log() + self._z_student.log()
        self.per_token = kl * self.settings.temperature**2

    def write_gradient(self, weight: Tensor) -> None:
        """As the base class says."""
        weight = weight * self.settings.temperature
        self.student.mul_((weight / self._z_student)[:, None])
        self.student.addcmul_(self.teacher, (weight / self._z_teacher)[:, None], value=-1)


class _StudentWeighted(Divergence):
    """Divergences whose gradient is q (g - sum q g): `steps` leaves g in `teacher`, exp(s) in `student`."""

    _z_student: Tensor
    _mean: Tensor  # sum q g [n]
    _factor = 1.0

    def write_gradient(self, weight: Tensor) -> None:
        """As the base class says."""
        scale = weight * (self.settings.temperature * self._factor) / self._z_student
        self.teacher.sub_(self._mean[:, None])
        self.student.mul_(self.teacher).mul_(scale[:, None])


class ReverseKL(_StudentWeighted):
    """KL(q || p) = sum q (s - a) - log Z_s + log Z_a; g = s - a."""

    def steps(self) -> Reductions:
        """Find `per_token`: two reductions."""
        yield from self._centre()
        student, teacher, work = self.student, self.teacher, self._work
        z_teacher = torch.exp(teacher, out=work).sum(1)
        torch.sub(student, teacher, out=teacher)
        student.exp_()
        cross = torch.mul(student, teacher, out=work).sum(1)
        sums = yield "sum", torch.stack((student.sum(1), z_teacher, cross))
        self._z_student, z_teacher, cross = sums
        self._mean = cross / self._z_student
        kl = self._mean - self._z_student.log() + z_teacher.log()
        self.per_token = kl * self.settings.temperature**2


class JensenShannon(_StudentWeighted):
    """beta KL(p || m) + (1 - beta) KL(q || m); g = (1 - beta) log(q / m).

    With d = log q - log p: log(m / p) = log(beta + (1 - beta) e^d), which is exact where p = q, and log(m / q) =
    log(1 - beta + beta e^-d); their difference is d, but d - log(m / p) is noise where d is large.
    """

    def steps(self) -> Reductions:
        """Find `per_token`: three reductions."""
        yield from self._centre()
        student, teacher, work, beta = self.student, self.teacher, self._work, self.settings.beta
        z_student = torch.exp(student, out=work).sum(1)
        z_teacher = torch.exp(teacher, out=work).sum(1)
        z_student, z_teacher = yield "sum", torch.stack((z_student, z_teacher))
        d = torch.sub(student, teacher, out=work).add_((z_teacher.log() - z_student.log())[:, None])
        log_m_p = torch.add(d, math.log1p(-beta), out=self._scratch.take(1, len(d)))
        torch.logaddexp(log_m_p, log_m_p.new_tensor(math.log(beta)), out=log_m_p)
        teacher_part = teacher.exp_().mul_(log_m_p).sum(1) / -z_teacher
        log_m_q = torch.sub(math.log(beta), d, out=d)
        torch.logaddexp(log_m_q, log_m_q.new_tensor(math.log1p(-beta)), out=log_m_q)
        torch.neg(log_m_q, out=teacher)
        student.exp_()
        student_part = torch.mul(student, teacher, out=work).sum(1) / z_student
        kl_teacher, kl_student = yield "sum", torch.stack((teacher_part, student_part))
        self._z_student, self._mean, self._factor = z_student, kl_student, 1 - beta
        self.per_token = (beta * kl_teacher + (1 - beta) * kl_student) * self.settings.temperature**2


_CLASSES: dict[str, Callable[[Tensor, Tensor, LossSettings, Scratch], Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
}


def divergence(student: Tensor, teacher: Tensor, settings: LossSettings, scratch: Scratch) -> Divergence:
    """The divergence that the settings name, over all columns; see `Divergence`."""
    return _CLASSES[settings.divergence](student, teacher, settings, scratch)


class NextToken:
    """Next-token cross-entropy at temperature 1 on a block of the student's logits.

    It reads the logits when first advanced and after its first answer, and so must come before what overwrites them.

    Args:
        student: logits [n, v] of this rank's columns; only read by `steps`.
        columns: [n] int64, each label's column among this rank's, -1 where another rank has it.
        work: [n, v], overwritten; kept until `add_gradient`.
    """

    def __init__(self, student: Tensor, columns: Tensor, work: Tensor) -> None:
        self.student, self._work = student, work
        self._mine = columns >= 0
        self._columns = columns.clamp(min=0)[:, None]
        self.per_token: Tensor

    def steps(self) -> Reductions:
        """Find `per_token` [n] in nats: two reductions. Where no rank has the label it means nothing."""
        peak = (yield "max", self.student.amax(1)[None])[0]
        centred = torch.sub(self.student, peak[:, None], out=self._work)
        label = torch.where(self._mine, centred.gather(1, self._columns)[:, 0], 0)
        self._z, label = yield "sum", torch.stack((centred.exp_().sum(1), label))
        self.per_token = self._z.log() - label

    def add_gradient(self, weight: Tensor) -> None:
        """Add the gradient of sum(weight * per_token) to `student`, once that holds a gradient; weight [n]."""
        self.student.addcmul_(self._work, (weight / self._z)[:, None])
        self.student.scatter_add_(1, self._columns, torch.where(self._mine, -weight, 0)[:, None])
