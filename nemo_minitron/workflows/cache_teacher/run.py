"""The work of `recipes/cache_teacher.py`: run a teacher once over a distillation's sequences and keep its states."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.config.recipes import CacheTeacherRecipe
from nemo_minitron.data.sequences import SplitSequences
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.files import remove, remove_stale
from nemo_minitron.nemo.session import Session
from nemo_minitron.workflows.cache_teacher import streamed
from nemo_minitron.workflows.cache_teacher.check import Prepared
from nemo_minitron.workflows.cache_teacher.teacher_states import write_states
from nemo_minitron.workflows.preflight import STATES
from nemo_minitron.workflows.teacher_loss import teacher_loss


def run(r: CacheTeacherRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write the cache, or what a killed run left to write.

    Returns:
        The fields of `result.json`.
    """
    plan = prepared.plan
    if rank() == 0:
        if r.overwrite:
            remove_stale(plan.directory)
        plan.begin()
    most = plan.contents.sequences
    samples = min(r.eval.samples or most, most)  # a small cache is not made to wait for a large measurement
    loss, fields = (_streamed if r.stream else _in_memory)(r, prepared, samples, directory)
    if rank() == 0:
        plan.finish(loss)
        remove(directory / STATES)
    parallel.barrier()
    return {
        **_result(r, prepared),
        "lm_loss_nats_teacher": loss,
        **fields,
        "peak_rss_gib": peak_rss_gib(),
    }


def _in_memory(
    r: CacheTeacherRecipe, prepared: Prepared, samples: int, _: Path
) -> tuple[float, dict[str, Any]]:
    """The teacher's loss, and how fast its states were written."""
    plan, mbs = prepared.plan, r.trainer.micro_batch_size
    session = Session(prepared.teacher, r.trainer)
    where = f"teacher={r.teacher}"
    loss = teacher_loss(session.chunks, prepared.data, r.data, samples, micro_batch_size=mbs, where=where)
    begin, rest = time.monotonic(), [n for n in range(len(plan.shards)) if n not in prepared.finished]
    write_states(session.chunks[0], plan, rest, _sequences(r, prepared), micro_batch_size=mbs)
    parallel.barrier()
    seconds = time.monotonic() - begin
    written = sum(len(plan.shards[n]) for n in rest) * plan.contents.seq_length
    return loss, {"write_s": round(seconds, 2), "tokens_per_s": round(written / seconds, 1)}


def _streamed(
    r: CacheTeacherRecipe, prepared: Prepared, samples: int, directory: Path
) -> tuple[float, dict[str, Any]]:
    """The same of a teacher that is not loaded."""
    one, states = streamed.teacher(r, prepared), directory / STATES
    loss = streamed.loss(r, prepared, one, samples, states)
    begin = time.monotonic()
    stream = streamed.write_states(r, prepared, one, _sequences(r, prepared), states)
    seconds = time.monotonic() - begin
    tokens = prepared.plan.contents.sequences * r.data.seq_length
    return loss, {
        "stream": True,
        **stream.facts(),
        "write_s": round(seconds, 2),
        # Of a run that went on with another's states it would say nothing.
        "tokens_per_s": None if stream.kept else round(tokens / seconds, 1),
    }


def _result(r: CacheTeacherRecipe, prepared: Prepared) -> dict[str, Any]:
    plan, t, contents = prepared.plan, r.trainer, prepared.plan.contents
    files = plan.directory.glob("*.safetensors")
    return {
        "recipe": "cache_teacher",
        "teacher": str(r.teacher),
        "data": r.data.name,
        "data_sha256": contents.data_sha256,
        "form": contents.form,
        "dtype": contents.dtype,
        "top_k": contents.top_k,
        "temperature": contents.temperature,
        "sequences": contents.sequences,
        "sequences_train": contents.samples["train"],
        "sequences_valid": contents.samples["valid"],
        "tokens": contents.sequences * contents.seq_length,
        "bytes_per_token": contents.bytes_per_token,
        "bytes": sum(file.stat().st_size for file in files),
        "shards": len(plan.shards),
        "shards_kept": len(prepared.finished),
        "ranks": t.ranks,
        "tensor_model_parallel_size": t.tensor_model_parallel_size,
        "pipeline_model_parallel_size": t.pipeline_model_parallel_size,
        "cache": str(plan.directory.resolve()),
    }


def _sequences(r: CacheTeacherRecipe, prepared: Prepared) -> Callable[[int], Any]:
    """The tokens int64 [s] of a sequence by its number in the cache."""
    plan = prepared.plan
    splits = {
        s: SplitSequences(prepared.data, r.data, s, n, prepared.conversations) for s, n in plan.drawn.items()
    }
    train = plan.contents.samples["train"]
    return lambda n: splits["train"].tokens(n) if n < train else splits["valid"].tokens(n - train)
