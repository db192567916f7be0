"""The work of `recipes/correct_teacher.py`: fit a teacher to the corpus that its students will learn on."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.recipes import CorrectTeacherRecipe, DistillRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.distill import run as distill
from nemo_minitron.workflows.distill.settings import CROSS_ENTROPY


def _training(r: CorrectTeacherRecipe) -> DistillRecipe:
    """Correction is a distillation whose student is the teacher and which has none."""
    return DistillRecipe(**{**vars(r), "student": r.teacher, "teacher": None})


def check(r: CorrectTeacherRecipe) -> distill.Prepared:
    """Refuse what cannot work; convert the checkpoint and index the data once.

    Raises:
        InputError: a schedule that is none of a correction, or what `distill.check` refuses of the teacher.
    """
    if r.distill.loss != CROSS_ENTROPY or r.distill.from_scratch:
        raise InputError(
            f"distill.loss={r.distill.loss}, distill.from_scratch={r.distill.from_scratch}: a teacher is corrected on "
            f"next tokens, from its own weights; must be {CROSS_ENTROPY} and false, as with distill=correction"
        )
    try:
        return distill.check(_training(r))
    except InputError as error:
        raise InputError(str(error).replace("student", "teacher", 1)) from None


def run(r: CorrectTeacherRecipe, prepared: distill.Prepared, directory: Path) -> dict[str, Any]:
    """Train, or go on where a killed run stopped; measure the teacher before and after.

    Returns:
        The fields of `result.json`.
    """
    result = distill.run(_training(r), prepared, directory, who="teacher")
    kept = (
        "params",
        "data",
        "data_sha256",
        "steps",
        "tokens",
        "seed",
        "lm_loss_nats_before",
        "lm_loss_nats_after",
        "eval_samples",
        "eval_tokens",
        "ranks",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "peak_rss_gib",
        "checkpoint",
    )
    return {"recipe": "correct_teacher", "teacher": str(r.teacher), **{name: result[name] for name in kept}}
