"""What `recipes/distill.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import DistillRecipe
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.errors import InputError
from nemo_minitron.synthesis.mixture import TeacherText, check_mixture, prepare_text
from nemo_minitron.workflows.distill import cache as cache_checks
from nemo_minitron.workflows.distill import settings as checks
from nemo_minitron.workflows.distill.conversations import check_conversations, prepare_conversations
from nemo_minitron.workflows.preflight import (
    check_source,
    check_vocabulary,
    converted,
    say_corpus,
    say_repeats,
    settle_rates,
)


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded; sources are of kind "nemo".

    `teacher_named`: where the user has the teacher, or where the student says that it came from.
    """

    student: Source
    teacher: Source | TeacherCache | None
    data: PreparedData
    trainer: TrainerConfig
    settings: LossSettings | None
    intermediate: Intermediate | None
    text: TeacherText | None
    teacher_named: str | None = None
    conversations: Conversations | None = None

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "student": str(self.student.path),
            "teacher": str(self.teacher.path) if isinstance(self.teacher, Source) else None,
            "teacher_cache": str(self.teacher.directory) if isinstance(self.teacher, TeacherCache) else None,
            "teacher_named": self.teacher_named,
            "data": self.data.to_config(),
            "sdg": self.text.to_config() if self.text else None,
            "conversations": self.conversations.to_config() if self.conversations else None,
        }


def check(r: DistillRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoints and index the data once.

    Raises:
        InputError: an invalid loss, weight or map; checkpoints or a cache that do not fit each other, the
            layout or the data.
    """
    ready = r.prepared or {}
    trainer, settings = checks.training_layout(r), checks.loss_settings(r)
    check_mixture(r.sdg, r.distill.sdg_weight)
    check_conversations(r.distill.conversations)
    student = _student(r, trainer)
    teacher, cache = None, cache_checks.open_cache(r, student, settings)
    named = ready.get("teacher_named") or r.teacher
    if settings is not None and cache is None:
        named = named or origin.teacher_of(r.student, r.data)
        teacher = find_source(ready.get("teacher") or named, "teacher", r.data)
        check_source("teacher", teacher, trainer, r.data.seq_length)
        checks.check_vocabularies(student, teacher)
    intermediate = checks.intermediate(r, student.architecture, teacher.architecture if teacher else None)
    data = prepare_data(r.data, str(student.tokenizer), ready.get("data"))
    check_vocabulary(student, data, trained=not r.distill.from_scratch)
    if teacher is not None:
        check_vocabulary(teacher, data)
    talks = prepare_conversations(r.distill.conversations, student, r.data, data, ready.get("conversations"))
    text = prepare_text(r.sdg, r.distill.sdg_weight, r.data, data, ready.get("sdg"))
    if cache is not None and text is not None:
        raise InputError(
            f"teacher_cache={r.teacher_cache}, sdg={r.sdg}: a cache has the corpus's states only"
        )
    if cache is not None and not ready:
        cache_checks.check_sequences(cache, r, data, talks)
    _say_data(r, trainer, data, prepared=bool(ready))
    teacher = None if teacher is None else converted(teacher, r.data)
    return Prepared(
        converted(student, r.data),
        teacher or cache,
        data,
        trainer,
        settings,
        intermediate,
        text,
        named,
        talks,
    )


def _student(r: DistillRecipe, t: TrainerConfig) -> Source:
    """What learns; what its schedule leaves open goes by its size."""
    ready = r.prepared or {}
    student = find_source(ready.get("student", r.student), "student", r.data)
    check_source("student", student, t, r.data.seq_length)
    size = student.architecture.parameters()
    settle_rates(r.distill.optim, "distill.optim", size, t.max_steps, prepared=bool(ready))
    return student


def _say_data(r: DistillRecipe, t: TrainerConfig, data: PreparedData, *, prepared: bool) -> None:
    say_corpus(r.data, data, prepared=prepared, what="learns")
    share = (1 - r.distill.sdg_weight) * (1 - r.distill.conversations.weight)
    say_repeats(
        r.data, data, share * t.max_steps * t.global_batch_size * r.data.seq_length, prepared=prepared
    )
