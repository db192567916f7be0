"""The work of `recipes/distill.py`: train a student on its teacher's predictions, and measure both."""

import math
from pathlib import Path
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import CHECKPOINT, find_source
from nemo_minitron.config.recipes import DistillRecipe
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.environment import peak_rss_gib, rss_gib
from nemo_minitron.files import read_steps
from nemo_minitron.nemo import fit, models, session, trainer
from nemo_minitron.nemo.counted_tokens import CountedTokens
from nemo_minitron.nemo.distill_transform import DistillTransform
from nemo_minitron.nemo.session import Session
from nemo_minitron.nemo.step_log import StepLog
from nemo_minitron.nemo.teacher import output_rows
from nemo_minitron.workflows.distill import settings as checks
from nemo_minitron.workflows.distill.check import Prepared
from nemo_minitron.workflows.teacher_loss import teacher_loss


def run(r: DistillRecipe, prepared: Prepared, directory: Path, *, who: str = "student") -> dict[str, Any]:
    """Train, or resume a run that was killed; measure the student before and after.

    Args:
        r: the recipe.
        prepared: of `check`.
        directory: the run's.
        who: what progress calls the model that learns.

    Returns:
        The fields of `result.json`.

    Raises:
        FloatingPointError: a loss or a gradient that is not finite; the last good checkpoint is kept.
    """
    imported = rss_gib()
    before, answers_before = _before(r, prepared, f"{who} before")
    trained = _train(r, prepared, directory)
    after, answers_after = _finish(r, prepared, directory, f"{who} after")
    d, t = r.distill, prepared.trainer
    return {
        "recipe": "distill",
        "student": origin.absolute(r.student),
        "teacher": _teacher_name(prepared),
        "teacher_cache": str(r.teacher_cache) if isinstance(prepared.teacher, TeacherCache) else None,
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
        **_of_conversations(prepared, answers_before, answers_after),
        "eval_samples": after.samples,
        "eval_tokens": after.tokens,
        "kl_nats_after": trained.get("valid", {}).get("kl"),
        "ranks": t.ranks,
        "tensor_model_parallel_size": t.tensor_model_parallel_size,
        "pipeline_model_parallel_size": t.pipeline_model_parallel_size,
        "rss_gib_before_models": imported,
        "peak_rss_gib": peak_rss_gib(),
        "teacher_states_gib": round(trained["ahead"].get("bytes", 0) / 2**30, 6),
        "teacher_schedule_s": round(trained["ahead"].get("seconds", 0.0), 2),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }


def _teacher_name(prepared: Prepared) -> str | None:
    """Where the teacher is, or was when its cache was written."""
    teacher = prepared.teacher
    if isinstance(teacher, TeacherCache):
        return teacher.contents.teacher
    return None if teacher is None else str(prepared.teacher_named)


def _before(r: DistillRecipe, prepared: Prepared, label: str) -> tuple[float | None, float | None]:
    """What the student loses on held-out text and on held-out answers, in nats a token; None of what is not learned."""
    if r.distill.from_scratch:
        return None, None
    source = prepared.student
    session = Session(source, r.trainer, seq_length=source.seq_length)
    loss = session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, label)
    return loss.nats, _answer_loss(r, prepared, session, label)


def _answer_loss(r: DistillRecipe, prepared: Prepared, session: Session, label: str) -> float | None:
    """Cross-entropy of the answers of held-out conversations, in nats a token; one epoch at most."""
    if prepared.conversations is None:
        return None
    dataset = prepared.conversations.dataset("valid", r.data)
    samples = min(r.eval.samples or len(dataset), len(dataset))
    return session.loss_on(dataset, samples, f"{label}, answers", tokens=r.data.seq_length).nats


def _of_conversations(prepared: Prepared, before: float | None, after: float | None) -> dict[str, Any]:
    """The fields of `result.json` that a run on conversations has beside the others."""
    c = prepared.conversations
    if c is None:
        return {}
    splits = {f"{name}_{key}": v for name in ("train", "valid") for key, v in vars(getattr(c, name)).items()}
    return {
        "conversations_weight": c.weight,
        "conversations_packed": c.packed,
        "answer_loss_nats_before": before,
        "answer_loss_nats_after": after,
        **{
            f"conversations_{key}": value
            for key, value in splits.items()
            if not key.endswith(("path", "replayed"))
        },
    }


def _finish(r: DistillRecipe, prepared: Prepared, directory: Path, label: str) -> tuple[Any, float | None]:
    """The held-out losses of the student as it is then saved: of text, and of answers.

    Raises:
        FloatingPointError: it is not finite; nothing is saved.
    """
    last = find_source(fit.last_checkpoint(directory), "student")
    dtype = r.trainer.checkpoint_dtype or prepared.student.dtype
    session = Session(last, r.trainer, seq_length=last.seq_length)
    session.round(dtype)
    after = session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, label)
    if not math.isfinite(after.nats):
        raise FloatingPointError(f"step {r.distill.max_steps - 1}: after it the LM loss is {after.nats}")
    answers = _answer_loss(r, prepared, session, label)
    fit.finish(session, directory, dtype)
    return after, answers


def _train(r: DistillRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """What the run says of the teacher and of its last validation."""
    data, t, source, text = prepared.data, prepared.trainer, prepared.student, prepared.text
    steps = StepLog(directory / "steps.jsonl")
    transform = None if prepared.teacher is None else _transform(r, prepared, steps)
    talks = prepared.conversations
    counted = CountedTokens(steps, None if talks else t.global_batch_size * r.data.seq_length)
    config = models.to_config(source.architecture, seq_length=source.seq_length, precision=t.precision)
    trainer.recompute(config, t)
    # Sequences of conversations have more answers or fewer: each token counts as much, not each microbatch.
    config.calculate_per_token_loss = talks is not None
    trainer.seed_everything(r.seed)
    tokenizer = session.nemo_tokenizer(talks.tokenizer if talks else data.tokenizer_dir, source.tokenizer)
    fit.fit(
        models.to_model(config, tokenizer, trainer.optimizer(r.distill.optim, t)),
        trainer.training_data(
            data.indexed, tokenizer, r.data, t, data.index_cache, text.paths(data) if text else None, talks
        ),
        trainer.trainer(t, training=True, callbacks=[*([transform] if transform else []), counted, steps]),
        directory,
        save_every_n_steps=t.val_check_interval,
        start=None if r.distill.from_scratch else source.path,
        new_parameters=prepared.intermediate is not None,
        logger=r.logger,
    )
    found = {entry["split"]: entry for entry in read_steps(steps.path)}
    return {**found, "ahead": {} if transform is None else _precomputed(transform)}


def _precomputed(transform: Any) -> dict[str, float]:
    """What the teacher's own schedules took, on the stage where it was the most."""
    stages = parallel.gather_over_pp((transform.teacher_states_bytes, transform.teacher_schedule_seconds))
    return {"bytes": max(b for b, _ in stages), "seconds": max(s for _, s in stages)}


def _transform(r: DistillRecipe, prepared: Prepared, steps: Any) -> Any:
    teacher = prepared.teacher
    assert teacher is not None
    assert prepared.settings is not None

    def loaded(chunks: list[Any]) -> None:
        if isinstance(teacher, TeacherCache):
            loss = teacher.manifest.lm_loss_nats
        else:
            loss = teacher_loss(
                chunks,
                prepared.data,
                r.data,
                r.eval.samples,
                micro_batch_size=r.trainer.micro_batch_size,
                where=f"teacher={prepared.teacher_named}",
            )
        steps.write("teacher", 0, {"lm_loss": loss})

    return DistillTransform(
        teacher,
        prepared.settings,
        vocab_size=checks.shared_vocabulary(prepared.student, output_rows(teacher)),
        intermediate=prepared.intermediate,
        precision=r.trainer.precision,
        on_loaded=loaded,
        on_step=steps.add,
    )
