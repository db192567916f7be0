"""The work of `recipes/correct_teacher.py`: fit a teacher to the corpus that its students will learn on."""

from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import origin
from nemo_minitron.config.recipes import CorrectTeacherRecipe
from nemo_minitron.workflows.correct_teacher.check import training_of
from nemo_minitron.workflows.distill import run as distill
from nemo_minitron.workflows.distill.check import Prepared


def run(r: CorrectTeacherRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Train, or resume a run that was killed; measure the teacher before and after.

    Returns:
        The fields of `result.json`.
    """
    result = distill.run(training_of(r), prepared, directory, who="teacher")
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
        "rss_gib_before_models",
        "peak_rss_gib",
        "checkpoint",
    )
    teacher = origin.absolute(r.teacher)
    return {"recipe": "correct_teacher", "teacher": teacher, **{name: result[name] for name in kept}}
