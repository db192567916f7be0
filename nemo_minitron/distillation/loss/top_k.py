"""Divergences over the teacher's k most probable tokens, with the rest as one outcome or left out.

The k (+ 1) outcomes make a small problem of unnormalised log-probabilities [n, k (+ 1)], the same on every rank;
`divergences` solves it, and its gradient is spread over the student's logits.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron.distillation.loss.batched_collectives import (
    Reductions,
    Request,
    reduce_nothing,
    run_in_step,
)
from nemo_minitron.distillation.loss.divergences import Scratch, divergence
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.vocabulary import VocabShard

# Stands for "no such outcome": finite, so that differences of two of them are no NaN.
NEVER = -1e30


@dataclass(frozen=True)
class TopKRows:
    """A cached teacher's most probable tokens at n tokens, all alike on every rank.

    Attributes:
        values: logits [n, k].
        indices: global token indices int64 [n, k].
        tail: log-sum-exp of the other tokens' logits / T [n], None if it is left out.
    """

    values: Tensor
    indices: Tensor
    tail: Tensor | None


class TopKDivergence:
    """Has the form of `divergences.Divergence`; the teacher is logits [n, v] (overwritten) or `TopKRows`.

    Args:
        student: logits [n, v] of this rank's columns, not yet divided by T; overwritten.
        teacher: see above.
        settings: its `top_k` is read where the teacher is logits.
        shard: which tokens the columns are.
        rows: v/tp of the student with padding, the same on every rank.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | TopKRows,
        settings: LossSettings,
        shard: VocabShard,
        rows: int,
    ) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self._shard, self._rows = shard, rows
        self._tail = settings.tail and not (isinstance(teacher, TopKRows) and teacher.tail is None)
        self.per_token: Tensor

    def steps(self) -> Reductions:
        """Find `per_token`: one reduction, and two more with a tail."""
        temperature = self.settings.temperature
        if isinstance(self.teacher, TopKRows):
            values, indices = self.teacher.values, self.teacher.indices
            self._locate(indices)
            picked = torch.where(self._mine, self.student.gather(1, self._columns), NEVER)
            picked = (yield "max", picked.T.contiguous()).T
        else:
            candidates = yield "gather", self._candidates(self.teacher)
            values, picked, indices = _best(candidates, self.settings.top_k or 0)
            self._locate(indices)
        logits = torch.stack((picked, values))
        # Before the division by T, which would round what is large.
        shift, tails = logits.amax(2), None
        if self._tail:
            peaks, sums = yield from self._tails()
            sides = len(peaks)
            # A cached tail is that of its values as they are.
            shift = torch.cat(
                (torch.maximum(shift[:sides], peaks), shift.new_zeros(2 - sides, shift.shape[1]))
            )
            tails = (peaks - shift[:sides]) / temperature + sums.log()
            if isinstance(self.teacher, TopKRows):
                assert self.teacher.tail is not None
                tails = torch.cat((tails, self.teacher.tail.to(tails.dtype).clamp(min=NEVER)[None]))
        outcomes = (logits - shift[:, :, None]) / temperature
        if tails is not None:
            outcomes = torch.cat((outcomes, tails[:, :, None]), dim=2)
        self._solve(outcomes)

    def _candidates(self, teacher: Tensor) -> Tensor:
        """[3, n, min(k, v/tp)]: the rank's largest teacher logits, the student's there, and the bits of their global
        indices."""
        wanted = min(self.settings.top_k or 0, self._rows)
        values, columns = teacher.topk(min(wanted, teacher.shape[1]), dim=1, sorted=False)
        indices = (columns + self._shard.first).to(
            torch.int32 if values.dtype == torch.float32 else torch.int64
        )
        packed = torch.stack((values, self.student.gather(1, columns), indices.view(values.dtype)))
        missing = wanted - values.shape[1]
        return torch.nn.functional.pad(packed, (0, missing), value=2 * NEVER) if missing else packed

    def _locate(self, indices: Tensor) -> None:
        """Which of the outcomes are this rank's, and in which columns."""
        columns = indices - self._shard.first
        self._mine = (columns >= 0) & (columns < self._shard.columns)
        self._columns = columns.where(self._mine, 0)

    def _tails(self) -> Generator[Request, Tensor, tuple[Tensor, Tensor]]:
        """The largest of the other tokens' logits and the sum of their exp((logits - largest) / T), each [sides, n]:
        student's, and teacher's if it is logits; leaves the student's exponentials, 0 at the k tokens, in `student`."""
        temperature, gone = self.settings.temperature, torch.where(self._mine, NEVER, torch.inf)
        sides = [self.student] if isinstance(self.teacher, TopKRows) else [self.student, self.teacher]
        for logits in sides:
            logits.scatter_reduce_(1, self._columns, gone.to(logits.dtype), "amin")
        peaks = yield "max", torch.stack([logits.amax(1) for logits in sides])
        for logits, peak in zip(sides, peaks, strict=True):
            logits.sub_(peak[:, None]).mul_(1 / temperature).exp_()
        sums = yield "sum", torch.stack([logits.sum(1) for logits in sides])
        self._z = sums[0]
        return peaks, sums

    def _solve(self, outcomes: Tensor) -> None:
        student, teacher = outcomes
        scratch = Scratch(len(student), student.shape[1], student.dtype, student.device)
        self._small = divergence(student, teacher, replace(self.settings, temperature=1.0), scratch)
        run_in_step([self._small.steps()], reduce_nothing)
        self.per_token = self._small.per_token * self.settings.temperature**2

    def write_gradient(self, weight: Tensor) -> None:
        """Overwrite `student` with the gradient of sum(weight * per_token); weight [n]."""
        self._small.write_gradient(weight * self.settings.temperature)
        gradient = self._small.student
        if self._tail:
            self.student.mul_((gradient[:, -1] / self._z)[:, None])
            gradient = gradient[:, :-1]
        else:
            self.student.zero_()
        self.student.scatter_add_(1, self._columns, torch.where(self._mine, gradient, 0))


def _best(candidates: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of [tp, 3, n, c] candidates: teacher's and student's logits, global indices int64; each [n, k]."""
    values, picked, bits = candidates.permute(1, 2, 0, 3).flatten(2)
    values, places = values.topk(k, dim=1)
    bits = bits.gather(1, places)
    indices = bits.view(torch.int32 if bits.dtype == torch.float32 else torch.int64).long()
    return values, picked.gather(1, places), indices
