"""What `recipes/distill.py` refuses before a model is loaded, and what its settings mean."""

import dataclasses
from pathlib import Path

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.recipes import DistillRecipe
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.distillation.intermediate import Intermediate, check_map, late_map
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import PrunePlan

CROSS_ENTROPY = "cross_entropy"


def training_layout(r: DistillRecipe) -> TrainerConfig:
    """The trainer's settings with the steps and batches of `distill`.

    Raises:
        InputError: a batch that the micro batches do not fill.
    """
    d, t = r.distill, r.trainer
    if d.global_batch_size % (t.micro_batch_size * t.data_parallel_size):
        raise InputError(
            f"distill.global_batch_size={d.global_batch_size}: must be a multiple of "
            f"trainer.micro_batch_size {t.micro_batch_size} x trainer.data_parallel_size {t.data_parallel_size}"
        )
    return dataclasses.replace(
        t,
        max_steps=d.max_steps,
        global_batch_size=d.global_batch_size,
        val_check_interval=min(d.val_check_interval or d.max_steps, d.max_steps),
        limit_val_batches=d.limit_val_batches,
    )


def loss_settings(r: DistillRecipe) -> LossSettings | None:
    """The loss on the output; None for next-token cross-entropy alone."""
    d = r.distill
    if d.loss == CROSS_ENTROPY:
        return None
    return LossSettings(d.loss, d.beta, d.temperature, d.top_k, d.tail, d.ce_weight)


def check_vocabularies(student: Source, teacher: Source) -> None:
    """Refuse a teacher of another tokenizer; the number of padding rows may differ.

    Raises:
        InputError: names the first token that differs.
    """
    ours, theirs = (load_tokenizer(str(source.tokenizer)).get_vocab() for source in (student, teacher))
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
        raise InputError(
            f"teacher: another tokenizer than the student's ({len(theirs)} entries, not {len(ours)}); they differ at "
            f"id {token[1]}, {token[0]!r}"
        )


def true_vocabulary(source: Source) -> int:
    """Entries of its tokenizer: the rows of its output layer without padding."""
    return len(load_tokenizer(str(source.tokenizer)))


def shared_vocabulary(student: Source, teacher_rows: int) -> int:
    """Over how many tokens both models are compared: all rows, or the tokenizer's where they are padded differently."""
    rows = student.architecture.vocab_size
    return rows if rows == teacher_rows else true_vocabulary(student)


def intermediate(
    r: DistillRecipe, student: Architecture, teacher: Architecture | None
) -> Intermediate | None:
    """Which states are compared; None where none are.

    Raises:
        InputError: layers that do not exist; a projection that would span pipeline stages; full
            recomputation.
    """
    i, where = r.distill.intermediate, "distill.intermediate"
    if i.layers is None and not i.embedding:
        return None
    if teacher is None:
        raise InputError(f"{where}: needs a teacher, but distill.loss={CROSS_ENTROPY}")
    found = Intermediate(_layers(r, student, teacher), i.embedding, i.at, i.distance, i.alpha, i.projection)
    maps = i.projection is not None or student.hidden_size != teacher.hidden_size
    stages = r.trainer.pipeline_model_parallel_size
    if maps and i.projection != "each" and stages > 1 and len(found.pairs) > 1:
        raise InputError(
            f"{where}.projection={i.projection or 'shared'}: its states lie on {stages} pipeline stages; must be each"
        )
    if r.trainer.recompute_granularity == "full":
        raise InputError(
            "trainer.recompute_granularity=full: whole layers are run twice, and states between them would be compared "
            "twice; must be selective or null"
        )
    return found


def _layers(r: DistillRecipe, student: Architecture, teacher: Architecture) -> dict[int, int]:
    layers = r.distill.intermediate.layers
    if layers is None:
        return {}
    given = late_map(teacher.num_layers, student.num_layers) if layers == "late" else layers
    try:
        check_map(given, teacher.num_layers, student.num_layers)
    except InputError as error:
        raise InputError(f"{error}{_kept_layers(r.student, error)}") from None
    return given


def _kept_layers(student: str, error: InputError) -> str:
    """What the layers of a student that lost some were called before, where that is known and of use."""
    path = Path(student) / "plan.json"
    if "the student has layers" not in str(error) or not path.is_file():
        return ""
    kept = PrunePlan.load(path).kept.layers
    return "" if kept is None else f", which were {kept} before the others were pruned"
