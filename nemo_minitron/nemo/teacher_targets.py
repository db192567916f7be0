"""What a student's loss takes of its teacher for each microbatch: of a live model, one that ran ahead, a cache."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.distillation.loss.losses import HiddenTeacher, TopKTeacher
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.vocabulary import vocab_shard
from nemo_minitron.nemo.intermediate_states import IntermediateLosses
from nemo_minitron.nemo.teacher import Teacher, microbatch_mask, microbatch_tokens


@dataclass(frozen=True)
class Microbatch:
    """`target`: of the loss on the output, on the last stage; `mask`: [b, s]; `states`: the teacher's, to compare with
    this stage's."""

    target: HiddenTeacher | TopKTeacher | None
    mask: Tensor
    states: dict[Any, Tensor]


class TeacherTargets(Protocol):
    """Where the targets come from.

    Attributes:
        reads_ahead: whether `begin` needs the step's microbatches, as NeMo's data loader gives them.
        states_bytes: the most that waited on this stage for one step.
        schedule_seconds: spent in schedules of the teacher's own so far.
    """

    reads_ahead: bool
    states_bytes: int
    schedule_seconds: float

    def begin(self, batches: list[Any]) -> None:
        """Before a step's schedule; every rank calls."""

    def microbatch(self, number: int, batch: dict[str, Any]) -> Microbatch:
        """Of a step's microbatch, as NeMo's data step gives it to the model; `number` from 0.

        Raises:
            InputError: a sequence is not in the cache.
        """

    def end(self) -> None:
        """After a step: what waited is let go."""


class LiveTargets:
    """The teacher runs when the student's schedule comes to a microbatch; on one pipeline stage.

    Args:
        teacher: beside the student.
        head: its output layer cut where the student's is, [v/tp, h]; None but on the last stage.
        compared: takes the states of layers, if any are compared.
    """

    reads_ahead = False
    states_bytes, schedule_seconds = 0, 0.0

    def __init__(self, teacher: Teacher, head: Tensor | None, compared: IntermediateLosses | None) -> None:
        self.teacher, self.head, self.compared = teacher, head, compared

    def begin(self, batches: list[Any]) -> None:
        """See `TeacherTargets`."""

    def microbatch(self, number: int, batch: dict[str, Any]) -> Microbatch:
        """See `TeacherTargets`."""
        hidden = self.teacher.hidden_states(batch)
        states = self.compared.take() if self.compared else {}
        return Microbatch(_hidden(hidden, self.head), batch["loss_mask"], states)

    def end(self) -> None:
        """See `TeacherTargets`."""


class PrecomputedTargets:
    """A schedule of the teacher's own runs before each step, and its states wait where they are compared.

    Arguments as of `LiveTargets`.
    """

    reads_ahead = True

    def __init__(self, teacher: Teacher, head: Tensor | None, compared: IntermediateLosses | None) -> None:
        self.teacher, self.head, self.compared = teacher, head, compared
        self.states_bytes, self.schedule_seconds = 0, 0.0
        self._waiting: list[Microbatch] = []

    def begin(self, batches: list[Any]) -> None:
        """See `TeacherTargets`."""
        begin = time.monotonic()
        found = self.teacher.precompute(batches, self.compared.take if self.compared else dict)
        hidden, states = [h for h, _ in found], [s for _, s in found]
        if self.compared is not None:
            states = self.compared.move(states, self.teacher.state_like(batches[0]))
        # What reaches a microbatch has no tokens on the last stage, and no mask on the others.
        masks = [microbatch_mask(batch).to(self.teacher.device) for batch in batches]
        self._waiting = [
            Microbatch(None if h is None else _hidden(h, self.head), mask, s)
            for h, mask, s in zip(hidden, masks, states, strict=True)
        ]
        waiting = [t for h, s in zip(hidden, states, strict=True) for t in (h, *s.values()) if t is not None]
        self.states_bytes = max(self.states_bytes, sum(t.numel() * t.element_size() for t in waiting))
        self.schedule_seconds += time.monotonic() - begin

    def microbatch(self, number: int, batch: dict[str, Any]) -> Microbatch:
        """See `TeacherTargets`."""
        return self._waiting[number]

    def end(self) -> None:
        """See `TeacherTargets`."""
        self._waiting = []


class CachedTargets:
    """Read from a cache; the ranks before the last stage need the masks only.

    Args:
        teacher: None but on the last stage.
        device: of the student.
    """

    reads_ahead = True
    states_bytes, schedule_seconds = 0, 0.0

    def __init__(self, teacher: "CachedTeacher | None", device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self._batches: list[Any] = []

    def begin(self, batches: list[Any]) -> None:
        """See `TeacherTargets`."""
        self._batches = batches

    def microbatch(self, number: int, batch: dict[str, Any]) -> Microbatch:
        """See `TeacherTargets`."""
        read = self._batches[number]
        target = None if self.teacher is None else self.teacher.target(microbatch_tokens(read))
        return Microbatch(target, microbatch_mask(read).to(self.device), {})

    def end(self) -> None:
        """See `TeacherTargets`."""
        self._batches = []


def _hidden(hidden: Tensor, head: Tensor | None) -> HiddenTeacher | None:
    return None if head is None else HiddenTeacher(hidden, head)


class CachedTeacher:
    """Gives the loss its teacher for any microbatch; on the ranks of the last stage.

    Args:
        cache: has every sequence that will be asked for.
        settings: the loss.
        student_rows: v/tp, the rank's rows of the student's output layer: the teacher's are cut where they are.
        vocab_size: tokens that both models are compared on.
        device: of the student.
    """

    def __init__(
        self,
        cache: TeacherCache,
        settings: LossSettings,
        student_rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.cache, self.settings, self.device = cache, settings, device
        self._head: Tensor | None = None
        if cache.contents.form == "hidden":
            shard = vocab_shard(student_rows, vocab_size)
            self._head = cache.head(slice(shard.first, shard.first + shard.columns)).to(device)

    def target(self, tokens: Tensor) -> HiddenTeacher | TopKTeacher:
        """The teacher of sequences tokens [b, s]; of hidden states each tensor-parallel rank reads its part.

        Raises:
            InputError: a sequence is not in the cache.
        """
        if self._head is not None:
            return HiddenTeacher(
                self.cache.hidden(tokens, self._part(tokens.shape[1])).to(self.device), self._head
            )
        assert self.settings.top_k is not None
        found = self.cache.top_k(tokens, self.settings.top_k, self.settings.tail)
        tail = found.tail_logsumexp
        return TopKTeacher(
            found.values.to(self.device),
            found.indices.to(self.device),
            None if tail is None else tail.to(self.device),
        )

    def _part(self, length: int) -> slice:
        """As sequence parallelism cuts a sequence: the loss gathers the parts, whether the student is cut so or not."""
        if length % parallel.tp_size():
            return slice(0, length)
        part = length // parallel.tp_size()
        return slice(parallel.tp_rank() * part, (parallel.tp_rank() + 1) * part)
