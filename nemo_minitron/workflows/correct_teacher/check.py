"""What `recipes/correct_teacher.py` refuses, and prepares, before a model is loaded."""

from nemo_minitron.config.recipes import CorrectTeacherRecipe, DistillRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.distill import check as distill
from nemo_minitron.workflows.distill.settings import CROSS_ENTROPY


def training_of(r: CorrectTeacherRecipe) -> DistillRecipe:
    """Correction is a distillation whose student is the teacher and which has none."""
    return DistillRecipe(**{**vars(r), "student": r.teacher, "teacher": None})


def check(r: CorrectTeacherRecipe) -> distill.Prepared:
    """Refuse what cannot work; convert the checkpoint and index the data once.

    Raises:
        InputError: a schedule that is not a correction's, or what `distill.check` refuses of the teacher.
    """
    if r.distill.loss != CROSS_ENTROPY or r.distill.from_scratch:
        raise InputError(
            f"distill.loss={r.distill.loss}, distill.from_scratch={r.distill.from_scratch}: a teacher is corrected on "
            f"next tokens, from its own weights; must be {CROSS_ENTROPY} and false, as with distill=correction"
        )
    try:
        return distill.check(training_of(r))
    except InputError as error:
        raise InputError(str(error).replace("student", "teacher", 1)) from None
