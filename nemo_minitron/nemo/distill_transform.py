"""Distillation as a NeMo model transform: turns any NeMo 2 GPT into the student of a frozen teacher."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from nemo.lightning.pytorch.callbacks import ModelTransform
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.distillation.loss.losses import distillation_loss
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.vocabulary import align_head
from nemo_minitron.megatron_gpt import forward_only, gpt_model, output_weight
from nemo_minitron.nemo.intermediate_states import IntermediateLosses, add_projections
from nemo_minitron.nemo.proven_checkpoints import describe_step
from nemo_minitron.nemo.teacher import Teacher, microbatch_tokens, output_rows
from nemo_minitron.nemo.teacher_targets import (
    CachedTargets,
    CachedTeacher,
    LiveTargets,
    Microbatch,
    PrecomputedTargets,
    TeacherTargets,
)

# What the last stage reports of a microbatch: sums over its tokens.
PARTS = ("loss", "kl", "lm_loss")


class DistillationReduction(MaskedTokenLossReduction):
    """NeMo's loss reduction for a student whose last stage returns `PARTS` instead of a loss for each token."""

    tokens = 0.0

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> Any:
        """NeMo's hook: (sum to differentiate, token count, what `reduce` gets)."""
        count = batch["loss_mask"].sum()
        parts = torch.cat([forward_out.detach(), count.view(1).to(forward_out)])
        # The pipeline's schedule frees what the last stage returns, and refuses a view.
        return forward_out[0].clone(), count.to(torch.int), {"parts": parts}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """NeMo's hook: the global batch's mean loss, nats a token; `means` has all parts', `tokens` their number."""
        outputs = [each["parts"] for each in losses_reduced_per_micro_batch]
        sums = torch.stack(outputs).double().sum(dim=0)
        parallel.all_reduce(sums, "dp")
        parallel.all_reduce(sums, "cp")
        self.means, self.tokens = (sums[:-1] / sums[-1]).tolist(), float(sums[-1])
        return (sums[0] / sums[-1]).to(outputs[0].dtype)


class DistillTransform(ModelTransform):
    """Trains a NeMo 2 GPT on its teacher's predictions; give it to the Trainer of the student.

    The student's last stage hands its final hidden states to `distillation.losses`, so that the logits of a whole
    microbatch never exist. With one pipeline stage the teacher runs inside the microbatch; with more, a forward-only
    schedule of the teacher runs before each step, and its states wait where they are compared: memory for the global
    batch's [s, b, h] on the last stage, and a second bubble (`teacher_states_bytes`, `teacher_schedule_seconds`).

    Args:
        teacher: a checkpoint of kind "nemo", with the student's vocabulary; it takes the student's layout. Or a cache,
            written under any layout, that has every sequence of the data; then no teacher is loaded. The data's
            positions and attention must be plain: neither begins anew inside a sequence.
        settings: the loss on the output.
        vocab_size: tokens that both models are compared on; None: all rows of their output layers, which must then be
            equally many. Where those are padded differently, this is how many they have in common.
        intermediate: residual states to compare beside it. Where that needs projections, they are parameters of the
            student while it is trained, and lie in its checkpoints beside the model's own.
        precision: of the teacher, "32" or "bf16-mixed".
        on_loaded: called with the teacher's Megatron GPTModels (none with a cache) before the first step, on every
            rank.
        on_step: called after each step with the split ("train", "valid") and means over the global batch, nats a token:
            `PARTS` and, with `intermediate`, "intermediate" and "alpha"; on every rank.
    """

    def __init__(
        self,
        teacher: Source | TeacherCache,
        settings: LossSettings,
        *,
        vocab_size: int | None = None,
        intermediate: Intermediate | None = None,
        precision: str = "32",
        on_loaded: Callable[[list[Any]], None] | None = None,
        on_step: Callable[[str, dict[str, float]], None] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.settings, self.precision = teacher, settings, precision
        self.vocab_size = vocab_size or output_rows(teacher)
        self.intermediate, self.on_loaded, self.on_step = intermediate, on_loaded, on_step
        self._alpha = intermediate.alpha if intermediate else None
        self._student: Any = None
        self.teacher: Teacher | None = None
        self._compared: IntermediateLosses | None = None
        self._targets: TeacherTargets | None = None
        self._current: Microbatch | None = None
        self._number = 0  # of the microbatch that comes next
        self._validation: list[dict[str, float]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook: losses for NeMo to reduce, and the parameters that training needs beside the model's."""
        self.trainer = trainer
        pl_module._training_loss_reduction = DistillationReduction()
        pl_module._validation_loss_reduction = DistillationReduction(validation_step=True)
        if self.intermediate is None:
            return
        assert isinstance(self.source, Source), "a cache holds no states between layers"
        configure, intermediate = pl_module.configure_model, self.intermediate
        teacher_hidden_size = self.source.architecture.hidden_size

        def with_projections(*args: Any, **kwargs: Any) -> None:
            configure(*args, **kwargs)
            add_projections(gpt_model(pl_module.module), intermediate, teacher_hidden_size)

        pl_module.configure_model = with_projections

    def _maybe_apply_transform(self, trainer: Any) -> None:
        if self._student is None:
            self.apply_transform(trainer)

    def apply_transform(self, trainer: Any) -> None:
        """Load the teacher, and let the student's last stage return losses."""
        module, chunks = trainer.lightning_module, list(trainer.strategy.megatron_parallel)
        assert len(chunks) == 1, "virtual pipeline stages are not supported"
        if isinstance(self.source, Source):
            length = module.config.seq_length
            self.teacher = Teacher(self.source, trainer.strategy, module.tokenizer, length, self.precision)
        if self.on_loaded is not None:
            self.on_loaded([self.teacher.chunk] if self.teacher else [])
        self._student = gpt_model(chunks[0])
        if self.intermediate is not None:
            assert self.teacher is not None, "a cache holds no states between layers"
            self._compared = IntermediateLosses(self.intermediate, self._student, self.teacher.chunk)
        if self._student.post_process:
            self._student._postprocess = self._postprocess
        self._targets = self._cached() if self.teacher is None else self._of(self.teacher)

    def _of(self, teacher: Teacher) -> TeacherTargets:
        head = None
        if self._student.post_process:  # cut where the student's [v/tp, h] is
            rows = output_weight(self._student).shape[0]
            head = align_head(output_weight(teacher.chunk), rows, self.vocab_size)
        kind = PrecomputedTargets if parallel.pp_size() > 1 else LiveTargets
        return kind(teacher, head, self._compared)

    def _cached(self) -> TeacherTargets:
        assert isinstance(self.source, TeacherCache)
        device, teacher = next(self._student.parameters()).device, None
        if self._student.post_process:
            rows = output_weight(self._student).shape[0]
            teacher = CachedTeacher(self.source, self.settings, rows, self.vocab_size, device)
        return CachedTargets(teacher, device)

    @property
    def teacher_states_bytes(self) -> int:
        """The most that waited on this stage for one step."""
        return self._targets.states_bytes if self._targets else 0

    @property
    def teacher_schedule_seconds(self) -> float:
        """Spent in the teacher's own schedules so far."""
        return self._targets.schedule_seconds if self._targets else 0.0

    def on_megatron_step_start(self, step: Any) -> Any:
        """NeMo's hook: what has to run before the student's schedule; the microbatches are read once and replayed."""
        assert self._targets is not None
        self._number = 0
        balances = self.intermediate is not None and self._alpha is None and self.trainer.training
        if not (balances or self._targets.reads_ahead):
            return step
        batches = [next(step.data) for _ in range(get_num_microbatches())]
        self._targets.begin(batches)
        if balances:
            self._first_balance(step, batches)
        return dataclasses.replace(step, data=iter(batches))

    def _first_balance(self, step: Any, batches: list[Any]) -> None:
        """Before the first step nothing is known of the losses: one pass without gradients."""
        self._alpha = 0.0
        batch, sequence = microbatch_tokens(batches[0]).shape
        with torch.no_grad():
            outputs = forward_only(step.forward_step_func, [step.model], batches, (batch, sequence))
        reduction = DistillationReduction()
        if self._student.post_process:
            reduction.reduce(outputs)
        self._alpha = _balance(self._shared(reduction))
        self._number = 0

    def on_megatron_microbatch_start(self, batch: dict[str, Any]) -> None:
        """NeMo's hook: the teacher's states of this microbatch, and the mask, which NeMo does not hand to the model."""
        assert self._targets is not None
        self._current = self._targets.microbatch(self._number, batch)
        self._number += 1
        if self._compared is not None:
            mask = self._current.mask
            # As Megatron's schedule scales the output's loss, which is a sum over the microbatch's tokens.
            scale = self._alpha or 0.0
            if not self._student.config.calculate_per_token_loss:
                scale /= float(mask.sum().clamp(min=1)) * get_num_microbatches()
            self._compared.begin(self._current.states, mask, scale)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **rest: Any) -> Tensor:
        """In place of Megatron's own on the last stage: the microbatch's `PARTS`, of which the first has a gradient."""
        student = self._student
        if labels is None:
            return type(student)._postprocess(student, hidden_states, labels=labels, **rest)
        assert self._current is not None
        assert self._current.target is not None
        result = distillation_loss(
            hidden_states,
            output_weight(student),
            self._current.target,
            self._current.mask,
            self.settings,
            vocab_size=self.vocab_size,
            labels=labels,
        )
        assert result.ce is not None
        return torch.stack([result.loss, *(part.detach().to(result.loss) for part in (result.kd, result.ce))])

    def _shared(self, reduction: Any) -> dict[str, float]:
        """A step's means, known on the last stage, on every rank; with the distances of all stages."""
        values = [0.0] * (len(PARTS) + 1)
        if self._student.post_process:
            values = [*reduction.means, reduction.tokens]
        assert self._current is not None
        shared = torch.tensor(values, dtype=torch.float64, device=self._current.mask.device)
        *means, tokens = parallel.broadcast_pp(shared, parallel.pp_size() - 1).tolist()
        parts = dict(zip(PARTS, means, strict=True))
        if self._compared is not None:
            parts["intermediate"] = self._compared.total() / tokens
        return parts

    def on_megatron_step_end(self, step: Any, reduced: Tensor) -> None:
        """NeMo's hook: the step's losses reach every rank.

        Raises:
            FloatingPointError: a loss that is not finite; the optimizer has not stepped.
        """
        training = bool(self.trainer.training)
        module = self.trainer.lightning_module
        parts = self._shared(module.training_loss_reduction if training else module.validation_loss_reduction)
        assert self._targets is not None
        self._targets.end()
        self._current = None
        if self._compared is not None:
            self._compared.end()
        if not training:
            self._validation.append(parts)
            return
        if not all(map(math.isfinite, parts.values())):
            raise FloatingPointError(f"{describe_step(self.trainer.global_step)}: {parts}")
        if self._alpha is not None:
            parts["alpha"] = self._alpha
        if self.intermediate is not None and self.intermediate.alpha is None:
            self._alpha = _balance(parts)
        if self.on_step is not None:
            self.on_step("train", parts)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook: the validation's means."""
        seen, self._validation = self._validation, []
        if seen and self.on_step is not None:
            self.on_step("valid", {name: sum(parts[name] for parts in seen) / len(seen) for name in seen[0]})

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook: what a run that goes on has to know."""
        return {"alpha": self._alpha}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's hook."""
        if self.intermediate is not None and self.intermediate.alpha is None:
            self._alpha = state_dict["alpha"]


def _balance(parts: dict[str, float]) -> float:
    return parts["loss"] / parts["intermediate"] if parts["intermediate"] else 0.0
