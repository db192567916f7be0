"""The losses between the states of a student and its teacher, under NeMo's training step."""

from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.intermediate import (
    Intermediate,
    Key,
    Projections,
    distance_sum,
    join,
    own_tokens,
    taps,
)

PROJECTION = "distillation_projection"

States = dict[Key, Tensor]


def add_projections(model: Any, intermediate: Intermediate, teacher_width: int) -> None:
    """Give a student's GPTModel the maps that it needs, before gradient buffers and optimizer are made.

    Args:
        model: this rank's stage.
        intermediate: which states are compared.
        teacher_width: the teacher's hidden_size.
    """
    config = model.config
    if intermediate.projection is None and config.hidden_size == teacher_width:
        return
    keys = taps(model, [student for _, student in intermediate.pairs], intermediate.at)
    if keys:
        projections = Projections(
            keys,
            config.hidden_size,
            teacher_width,
            shared=intermediate.projection != "each",
            sequence_parallel=config.sequence_parallel,
            dtype=config.params_dtype,
        )
        setattr(model, PROJECTION, projections)


class IntermediateLosses:
    """Reads the teacher's states, compares the student's, and lets the losses join the backward pass.

    Args:
        intermediate: which states are compared.
        student, teacher: this rank's GPTModels of the same stage.
    """

    def __init__(self, intermediate: Intermediate, student: Any, teacher: Any) -> None:
        self.settings, self._student = intermediate, student
        self._projections = getattr(student, PROJECTION, None)
        self._read: States = {}
        self._states: States = {}
        self._weight: Tensor | None = None
        self._scale = 0.0
        self._sum = torch.zeros((), dtype=torch.float64)
        student_taps = taps(student, [s for _, s in intermediate.pairs], intermediate.at)
        teacher_taps = taps(teacher, [t for t, _ in intermediate.pairs], intermediate.at)
        for key, tap in teacher_taps.items():
            tap.attach(self._reader(key, tap.state))
        for of_teacher, of_student in intermediate.pairs:
            if (own := student_taps.get(of_student)) is not None:
                own.attach(self._comparer(of_teacher, of_student, own.state))
        held = parallel.gather_over_pp((list(student_taps), list(teacher_taps)))
        self._stages = [
            (_stage(held, 1, of_teacher), _stage(held, 0, of_student))
            for of_teacher, of_student in intermediate.pairs
        ]

    def _reader(self, key: Key, state: Any) -> Any:
        def visit(x: Tensor) -> Tensor:
            self._read[key] = state(x).detach()
            return x

        return visit

    def _comparer(self, of_teacher: Key, of_student: Key, state: Any) -> Any:
        def visit(x: Tensor) -> Tensor:
            if self._weight is None:
                return x
            own = state(x)
            if self._projections is not None:
                own = self._projections(of_student, own)
            loss = distance_sum(own, self._states[of_teacher], self._weight, self.settings.distance)
            self._sum = self._sum.to(loss.device) + loss.detach()
            return join(x, loss * self._scale) if torch.is_grad_enabled() and self._scale else x

        return visit

    def take(self) -> States:
        """The teacher's states of its last forward pass on this stage; they are forgotten here."""
        taken, self._read = self._read, {}
        return taken

    def move(self, microbatches: list[States], like: Tensor) -> list[States]:
        """Each state, by microbatch, from the stage of the teacher's layer to that of the student's; all stages call.

        Args:
            microbatches: what `take` gave for each.
            like: a tensor of a state's shape, dtype and device.
        """
        here = parallel.pp_rank()
        send, receive, found = [], [], []
        for states in microbatches:
            arrived: States = {}
            for (key, _), (source, target) in zip(self.settings.pairs, self._stages, strict=True):
                if source == target == here:
                    arrived[key] = states[key]
                elif source == here:
                    send.append((target, states[key].contiguous()))
                elif target == here:
                    arrived[key] = torch.empty_like(like)
                    receive.append((source, arrived[key]))
            found.append(arrived)
        parallel.exchange_pp(send, receive)
        return found

    def begin(self, states: States, loss_mask: Tensor, scale: float) -> None:
        """A microbatch starts.

        Args:
            states: the teacher's, where this stage compares any.
            loss_mask: [b, s].
            scale: of the sums over tokens, in what is differentiated.
        """
        self._states, self._scale = states, scale
        self._weight = own_tokens(loss_mask, self._student.config.sequence_parallel)

    def end(self) -> None:
        """The step's microbatches are done: the student may run without its teacher."""
        self._states, self._weight = {}, None

    def total(self) -> float:
        """The distances' sum over all tokens of the global batch since the last call; every rank calls."""
        total, self._sum = self._sum.clone(), torch.zeros_like(self._sum)
        if self._student.config.sequence_parallel:
            parallel.all_reduce(total, "tp")
        return float(parallel.all_reduce(parallel.all_reduce(total, "dp"), "pp"))


def _stage(held: list[Any], which: int, key: Key) -> int:
    return next(stage for stage, of_stage in enumerate(held) if key in of_stage[which])
