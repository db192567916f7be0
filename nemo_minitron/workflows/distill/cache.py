"""What `recipes/distill.py` asks of a teacher's cache before a model is loaded."""

import hashlib
import json
from typing import Any

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.document_limits import refuse_limits
from nemo_minitron.config.recipes import DataConfig, DistillRecipe
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.data.sequences import Schedule, SplitSequences, schedules
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.distillation.cache.format import Contents
from nemo_minitron.distillation.cache.reader import TeacherCache, covers
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.errors import InputError


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hex sha256 over a Hugging Face tokenizer's entries and ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def split_schedules(d: Any) -> dict[str, Schedule]:
    """What a distillation with these settings (a `DistillConfig`) reads of each split."""
    return schedules(d.max_steps, d.global_batch_size, d.val_check_interval, d.limit_val_batches)


def sequences_sha256(data: PreparedData, conversations: Conversations | None) -> str:
    """Names what the sequences are made of."""
    manifest = data.indexed.manifest_sha256
    return manifest if conversations is None else conversations.sha256(manifest)


def data_name(data: PreparedData, conversations: Conversations | None) -> str:
    """For people."""
    if conversations is None:
        return data.indexed.corpus
    return f"conversations, weight {conversations.weight}, and {data.indexed.corpus}"


def open_cache(r: DistillRecipe, student: Source, settings: LossSettings | None) -> TeacherCache | None:
    """The cache that the configuration names, checked against it; None where it names none.

    Checksums and the teacher's identity are compared once, not again by the launcher's ranks.

    Raises:
        InputError: no cache; one that this run cannot learn from; a corrupt one.
    """
    if r.teacher_cache is None:
        return None
    refuse_limits(r.data, "a teacher_cache holds one whose documents see each other")
    if settings is None:
        raise InputError(
            f"teacher_cache={r.teacher_cache}: distill.loss={r.distill.loss} has no use for a teacher"
        )
    if r.distill.intermediate.layers is not None or r.distill.intermediate.embedding:
        raise InputError(
            f"teacher_cache={r.teacher_cache}: holds what enters the output layer, but distill.intermediate compares "
            "states before it: leave the cache out for a live teacher, or choose distill=demo or minitron, without them"
        )
    if r.trainer.context_parallel_size > 1:
        raise InputError(
            f"trainer.context_parallel_size={r.trainer.context_parallel_size}: must be 1 with teacher_cache"
        )
    cache = TeacherCache((r.prepared or {}).get("teacher_cache", r.teacher_cache))
    _check_contents(cache, r, student)
    _check_loss(cache.contents, cache.where, settings, student)
    if not r.prepared:
        if r.teacher is not None:
            _check_teacher(cache, r.teacher, r.data)
        if r.verify_cache:
            cache.verify()
    return cache


def _check_contents(cache: TeacherCache, r: DistillRecipe, student: Source) -> None:
    contents = cache.contents
    for key, ours, theirs in (
        ("data.seq_length", r.data.seq_length, contents.seq_length),
        ("data.seed", r.data.seed, contents.data_seed),
    ):
        if ours != theirs:
            raise InputError(f"{cache.where}: was written with {key}={theirs}, this run has {ours}")
    if vocabulary_sha256(load_tokenizer(str(student.tokenizer))) != contents.vocabulary_sha256:
        raise InputError(
            f"{cache.where}: is of another tokenizer than the student's (the teacher was {contents.teacher})"
        )


def _check_loss(contents: Contents, where: str, settings: LossSettings, student: Source) -> None:
    if contents.form != "top_k":
        return
    assert contents.top_k is not None
    if settings.top_k is None or settings.top_k > contents.top_k:
        raise InputError(
            f"distill.top_k={settings.top_k}: {where} holds the teacher's {contents.top_k} most probable tokens; must "
            "be at most that many"
        )
    if settings.tail and settings.temperature != contents.temperature:
        raise InputError(
            f"distill.temperature={settings.temperature}: {where} has the tail at {contents.temperature}; must be "
            "that, or distill.tail=false"
        )
    if student.architecture.vocab_size != contents.vocab_size:
        raise InputError(
            f"{where}: the teacher's output layer had {contents.vocab_size} rows, the student's has "
            f"{student.architecture.vocab_size}: padded differently, only a cache of hidden states can be used"
        )


def _check_teacher(cache: TeacherCache, teacher: str, data: DataConfig) -> None:
    sha256 = find_source(teacher, "teacher", data).sha256()
    if sha256 not in cache.contents.teacher_sha256:
        raise InputError(
            f"teacher={teacher}: {cache.where} was made by another, {cache.contents.teacher}; leave teacher out"
        )


def check_sequences(
    cache: TeacherCache, r: DistillRecipe, data: PreparedData, conversations: Conversations | None = None
) -> None:
    """Refuse a cache without all of the sequences that this run will read, by their tokens; with progress.

    Raises:
        InputError: of another corpus; or says how many are missing.
    """
    ours = sequences_sha256(data, conversations)
    if ours != cache.contents.data_sha256:
        raise InputError(
            f"{cache.where}: is of another corpus or other conversations, {cache.contents.data} "
            f"({cache.contents.data_sha256[:12]}); this run reads {data_name(data, conversations)} ({ours[:12]})"
        )
    if (begin := tuple(data.indexed.beginning)) != (theirs := cache.contents.beginning):
        raise InputError(
            f"data.bos={r.data.bos}: documents begin with the tokens {[*begin]}, in {cache.where} with {[*theirs]}"
        )
    for split, schedule in split_schedules(r.distill).items():
        sequences = SplitSequences(data, r.data, split, schedule.drawn, conversations)
        covers(cache, sequences.tokens, schedule.used, split)
