"""The work of `recipes/distill.py`: train a student on its teacher's predictions, and measure both."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import recipe
from nemo_minitron.config import DistillRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.distillation.settings import LossSettings
from nemo_minitron.errors import InputError
from nemo_minitron.layout import TrainerConfig
from nemo_minitron.nemo import distill_checks as checks
from nemo_minitron.nemo.checkpoints import CHECKPOINT, Source, find_source
from nemo_minitron.nemo.openings import check_source, check_vocabulary, converted
from nemo_minitron.synthesis.mixture import TeacherText, check_mixture, prepare_text

logger = logging.getLogger("nemo_minitron")
# Nats. Random weights cost as much as a guess among all tokens, or more.
BETTER_THAN_A_GUESS = 0.1


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded; both sources are of kind "nemo"."""

    student: Source
    teacher: Source | None
    data: PreparedData
    trainer: TrainerConfig
    settings: LossSettings | None
    between: Intermediate | None
    text: TeacherText | None

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "student": str(self.student.path),
            "teacher": str(self.teacher.path) if self.teacher else None,
            "data": self.data.to_config(),
            "sdg": self.text.to_config() if self.text else None,
        }


def check(r: DistillRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoints and index the data once.

    Raises:
        InputError: a loss, a weight or a map that is none; checkpoints that do not fit each other, the layout or
            the data.
    """
    ready = r.prepared or {}
    trainer, settings = checks.training_layout(r), checks.loss_settings(r)
    check_mixture(r.sdg, r.distill.sdg_weight)
    student = find_source(ready.get("student", r.student), "student")
    check_source("student", student, trainer, r.data.seq_length)
    teacher = None
    if settings is not None:
        if r.teacher is None:
            raise InputError(
                f"teacher: give one, or train on next tokens alone with distill.loss={checks.CROSS_ENTROPY}"
            )
        teacher = find_source(ready.get("teacher") or r.teacher, "teacher")
        check_source("teacher", teacher, trainer, r.data.seq_length)
        checks.check_vocabularies(student, teacher)
    between = checks.intermediate(r, student.architecture, teacher.architecture if teacher else None)
    data = prepare_data(r.data, str(student.tokenizer), ready.get("data"))
    check_vocabulary(student, data)
    text = prepare_text(r.sdg, r.distill.sdg_weight, r.data, data, ready.get("sdg"))
    teacher = None if teacher is None else converted(teacher, r.data)
    return Prepared(converted(student, r.data), teacher, data, trainer, settings, between, text)


def run(r: DistillRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or go on where a killed run stopped; measure the student before and after.

    Returns:
        The fields of `result.json`.
    """
    before = (
        None if r.distill.from_scratch else _lm_loss(r, prepared, prepared.student, "student before").nats
    )
    trained = _train(r, prepared, directory)
    after = _lm_loss(r, prepared, find_source(directory / CHECKPOINT), "student after")
    d, t = r.distill, prepared.trainer
    return {
        "recipe": "distill",
        "student": str(r.student),
        "teacher": str(r.teacher) if prepared.teacher else None,
        "data": r.data.name,
        "data_sha256": prepared.data.indexed.manifest_sha256,
        "sdg": r.sdg,
        "sdg_sha256": prepared.text.indexed.manifest_sha256 if prepared.text else None,
        "sdg_weight": d.sdg_weight,
        "loss": d.loss,
        "ce_weight": d.ce_weight,
        "from_scratch": d.from_scratch,
        "params": prepared.student.architecture.parameters(),
        "steps": d.max_steps,
        "tokens": d.max_steps * d.global_batch_size * r.data.seq_length,
        "seed": r.seed,
        "lm_loss_nats_teacher": trained.get("teacher", {}).get("lm_loss"),
        "lm_loss_nats_before": before,
        "lm_loss_nats_after": after.nats,
        "eval_samples": after.samples,
        "eval_tokens": after.tokens,
        "kl_nats_after": trained.get("valid", {}).get("kl"),
        "ranks": t.ranks,
        "tensor_model_parallel_size": t.tensor_model_parallel_size,
        "pipeline_model_parallel_size": t.pipeline_model_parallel_size,
        "peak_rss_gib": recipe.peak_rss_gib(),
        "teacher_states_gib": round(trained["ahead"].get("bytes", 0) / 2**30, 3),
        "teacher_schedule_s": round(trained["ahead"].get("seconds", 0.0), 2),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }


def _lm_loss(r: DistillRecipe, prepared: Prepared, source: Source, label: str) -> Any:
    from nemo_minitron.nemo.session import Session

    session = Session(source, r.trainer, seq_length=source.seq_length)
    return session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, label)


def _train(r: DistillRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """What the run says of the teacher and of its last validation."""
    from nemo_minitron.nemo import models, session, trainer, training
    from nemo_minitron.nemo.steplog import StepLog, read_steps

    data, t, source, text = prepared.data, prepared.trainer, prepared.student, prepared.text
    steps = StepLog(directory / "steps.jsonl")
    transform = None if prepared.teacher is None else _transform(r, prepared, steps)
    config = models.to_config(source.architecture, seq_length=source.seq_length, precision=t.precision)
    trainer.recompute(config, t)
    trainer.seed_everything(r.seed)
    tokenizer = session.nemo_tokenizer(data.tokenizer_dir)
    training.fit(
        models.to_model(config, tokenizer, trainer.optimizer(r.distill.optim, t)),
        trainer.training_data(
            data.indexed, tokenizer, r.data, t, data.index_cache, text.paths(data) if text else None
        ),
        trainer.trainer(t, training=True, callbacks=[*([transform] if transform else []), steps]),
        directory,
        save_every_n_steps=t.val_check_interval,
        start=None if r.distill.from_scratch else source.path,
        new_parameters=prepared.between is not None,
    )
    found = {entry["split"]: entry for entry in read_steps(steps.path)}
    ahead = {} if transform is None else {"bytes": transform.ahead_bytes, "seconds": transform.ahead_seconds}
    return {**found, "ahead": ahead}


def _transform(r: DistillRecipe, prepared: Prepared, steps: Any) -> Any:
    from nemo_minitron.nemo.distillation import DistillTransform

    assert prepared.teacher is not None
    assert prepared.settings is not None
    return DistillTransform(
        prepared.teacher,
        prepared.settings,
        vocab_size=checks.shared_vocabulary(prepared.student, prepared.teacher),
        between=prepared.between,
        precision=r.trainer.precision,
        on_loaded=lambda chunks: steps.write("teacher", 0, {"lm_loss": _teacher_loss(r, prepared, chunks)}),
        on_step=steps.add,
    )


def _teacher_loss(r: DistillRecipe, prepared: Prepared, chunks: list[Any]) -> float:
    """The loaded teacher's own LM loss; a teacher that lost its weights on the way teaches nothing.

    Raises:
        InputError: it guesses.
    """
    from nemo_minitron.data.statistics import unigram_entropy_nats
    from nemo_minitron.nemo.session import split_loss

    loss = split_loss(
        chunks,
        prepared.data,
        r.data,
        "valid",
        r.eval.samples,
        micro_batch_size=r.trainer.micro_batch_size,
        label="teacher",
    ).nats
    guess = math.log(checks.true_vocabulary(prepared.student))
    frequencies = unigram_entropy_nats(prepared.data.indexed.valid_prefix)
    if not loss < guess - BETTER_THAN_A_GUESS:
        raise InputError(
            f"teacher={r.teacher}: its LM loss is {loss:.3f} nats on the held-out data, where guessing costs "
            f"{guess:.3f}: its weights are not those that were trained, or the data is not for it"
        )
    if loss >= frequencies:
        logger.warning(
            "teacher: its LM loss, %.3f nats, is no better than the frequency of each token (%.3f)",
            loss,
            frequencies,
        )
    return loss
