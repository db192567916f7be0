"""What `recipes/cache_teacher.py` refuses, and prepares, before a model is loaded."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.checkpoints.tensor_files import check_tied
from nemo_minitron.checkpoints.weight_files import read_headers
from nemo_minitron.config.document_limits import refuse_limits
from nemo_minitron.config.recipes import CacheTeacherRecipe
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.distillation.cache.format import DTYPES, Contents
from nemo_minitron.distillation.cache.reader import CACHE
from nemo_minitron.distillation.cache.writer import CachePlan
from nemo_minitron.errors import InputError
from nemo_minitron.workflows.distill.cache import (
    data_name,
    sequences_sha256,
    split_schedules,
    vocabulary_sha256,
)
from nemo_minitron.workflows.distill.conversations import check_conversations, prepare_conversations
from nemo_minitron.workflows.distill.settings import loss_settings
from nemo_minitron.workflows.preflight import (
    STATES,
    check_room,
    check_source,
    check_streamed,
    check_vocabulary,
    converted,
    huggingface_source,
)

_BESIDE = 16 << 20  # bytes; progress, notes, log


@dataclass(frozen=True)
class Prepared:
    """What is known and made before the teacher is loaded. `teacher` is of kind "nemo", with `stream=true` of kind
    "huggingface"; `finished`: shards that an earlier run left, by number."""

    teacher: Source
    data: PreparedData
    plan: CachePlan
    finished: tuple[int, ...]
    conversations: Conversations | None = None

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "teacher": str(self.teacher.path),
            "teacher_sha256": list(self.plan.contents.teacher_sha256),
            "data": self.data.to_config(),
            "finished": list(self.finished),
            "conversations": self.conversations.to_config() if self.conversations else None,
        }


def check(r: CacheTeacherRecipe) -> Prepared:
    """Refuse what cannot work or fit; say the size; convert the checkpoint, unless it is streamed, and index the data
    once.

    Raises:
        InputError: an impossible form or number; a teacher that does not fit the layout or the data; less free space
            than the cache needs; a run directory with shards of other settings.
    """
    ready = r.prepared or {}
    _check_settings(r)
    teacher = _teacher(r, ready)
    check_source("teacher", teacher, r.trainer, r.data.seq_length)
    data = prepare_data(r.data, str(teacher.tokenizer), ready.get("data"))
    check_vocabulary(teacher, data)
    talks = prepare_conversations(r.distill.conversations, teacher, r.data, data, ready.get("conversations"))
    if ready:
        plan = _plan(r, _contents(r, teacher, data, talks, ready["teacher_sha256"]))
        return Prepared(teacher, data, plan, tuple(ready["finished"]), talks)
    rough = _contents(r, teacher, data, talks, ())
    if r.stream:
        _check_room(r, rough)
    _check_space(r, rough)
    sha256 = [teacher.sha256()]
    if not r.stream:
        teacher = converted(teacher, r.data)
        sha256 += [s for s in [teacher.sha256()] if s not in sha256]
    plan = _plan(r, _contents(r, teacher, data, talks, sha256))
    finished = {} if r.overwrite else plan.finished()
    return Prepared(teacher, data, plan, tuple(finished), talks)


def _teacher(r: CacheTeacherRecipe, ready: Mapping[str, Any]) -> Source:
    path = ready.get("teacher") or r.teacher
    if not r.stream:
        return find_source(path, "teacher", r.data)
    check_streamed(r.trainer)
    teacher = huggingface_source(path, "teacher", r.data)
    if teacher.architecture.share_embeddings_and_output_weights and not ready:
        where = f"teacher={path}"
        check_tied(read_headers(teacher.path, where), where)  # as converting does
    return teacher


def _check_settings(r: CacheTeacherRecipe) -> None:
    c = r.cache
    check_conversations(r.distill.conversations)
    refuse_limits(r.data, "a cache holds a teacher whose documents see each other")
    if r.trainer.context_parallel_size > 1:
        raise InputError(f"trainer.context_parallel_size={r.trainer.context_parallel_size}: must be 1 here")
    if loss_settings(r) is None:  # type: ignore[arg-type]
        raise InputError(f"distill.loss={r.distill.loss}: has no use for a teacher")
    if c.form == "top_k" and r.distill.top_k is None:
        raise InputError("distill.top_k=null: cache.form=top_k needs a number, such as 64")


def _contents(
    r: CacheTeacherRecipe,
    teacher: Source,
    data: PreparedData,
    conversations: Conversations | None,
    sha256: Sequence[str],
) -> Contents:
    arch, top_k = teacher.architecture, r.distill.top_k if r.cache.form == "top_k" else None
    if top_k is not None and top_k > arch.vocab_size:
        raise InputError(
            f"distill.top_k={top_k}: must be at most {arch.vocab_size}, the teacher's vocabulary"
        )
    used = {split: schedule.used for split, schedule in split_schedules(r.distill).items()}
    asked = {"train": r.cache.train_samples, "valid": r.cache.valid_samples}
    return Contents(
        form=r.cache.form,
        dtype="bfloat16" if r.trainer.precision.startswith("bf16") else "float32",
        teacher=str(r.teacher),
        teacher_sha256=tuple(sha256),
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        vocabulary_sha256=vocabulary_sha256(data.tokenizer),
        data=data_name(data, conversations),
        data_sha256=sequences_sha256(data, conversations),
        data_seed=r.data.seed,
        seq_length=r.data.seq_length,
        samples={split: asked[split] or used[split] for split in used},
        top_k=top_k,
        temperature=None if top_k is None else float(r.distill.temperature),
        beginning=tuple(data.indexed.beginning),
    )


def _plan(r: CacheTeacherRecipe, contents: Contents) -> CachePlan:
    drawn = {split: schedule.drawn for split, schedule in split_schedules(r.distill).items()}
    return CachePlan(
        Path(r.run_dir) / CACHE,
        contents,
        max(1, (r.cache.shard_mib << 20) // contents.bytes_per_sequence),
        {split: max(drawn[split], contents.samples[split]) for split in drawn},
    )


def _check_room(r: CacheTeacherRecipe, contents: Contents) -> None:
    """Refuse a streamed cache whose residual states, or the last of them and itself, the disk cannot hold."""
    run_dir = Path(r.run_dir)
    states = contents.sequences * contents.seq_length * contents.hidden_size * DTYPES[contents.dtype].itemsize
    needs = {
        "residual states before a layer": states,
        f"{'the cache' if contents.bytes > states else 'those'} after it": max(states, contents.bytes),
        "files beside them": _BESIDE,
    }
    left = (run_dir / CACHE, run_dir / STATES)
    there = sum(file.stat().st_size for place in left for file in place.rglob("*") if file.is_file())
    check_room("run_dir", run_dir, needs, there)


def _check_space(r: CacheTeacherRecipe, contents: Contents) -> None:
    """Say what the cache takes; refuse it where that is more than is free."""
    # What an earlier run of the directory left is kept, or goes before anything is written.
    held = sum(path.stat().st_size for path in (Path(r.run_dir) / CACHE).glob("*.safetensors"))
    place = Path(r.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, max(contents.bytes - held, 0)
    tokens = contents.sequences * contents.seq_length
    size = (
        f"teacher's cache, {contents.form}: {contents.sequences:,} sequences of {contents.seq_length} tokens, "
        f"{contents.bytes_per_token:,} bytes a token: {contents.bytes:,} bytes, {contents.bytes / 2**30:,.3f} GiB"
    )
    if needed > free:
        raise InputError(
            f"{size}; {place} has {free / 2**30:,.3f} GiB free: choose fewer sequences (distill.max_steps, "
            "cache.train_samples), cache=top_k, or another run_dir"
        )
    kept = f", {held / 2**30:,.3f} GiB of it there" if held and not r.overwrite else ""
    print(f"{size}{kept}; {free / 2**30:,.3f} GiB free ({tokens:,} tokens)", file=sys.stderr, flush=True)
