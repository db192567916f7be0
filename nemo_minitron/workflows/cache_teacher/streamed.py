"""A teacher's cache where no memory here holds the teacher: all sequences go through one layer, then through the next.

Each shard's sequences are samples of a kind of their own, so that they meet in microbatches as they do in memory. Up to
the last layer they are residual states on the disk; what the last one gives of a shard is written at once.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.recipes import CacheTeacherRecipe
from nemo_minitron.distillation.cache.writer import CachePlan
from nemo_minitron.files import remove
from nemo_minitron.workflows.cache_teacher.check import Prepared
from nemo_minitron.workflows.cache_teacher.teacher_states import Keep, head_of, keeper
from nemo_minitron.workflows.layer_stream import Figures, LayerStream, Samples
from nemo_minitron.workflows.one_layer import OneLayer
from nemo_minitron.workflows.streamed_model import held_out, one_layer, stream_of, streamed_loss
from nemo_minitron.workflows.teacher_loss import checked


class _Sequences:
    """Those of a shard as GPTDataset gives them, but for what only a loss needs."""

    def __init__(self, numbers: range, sequence: Callable[[int], Tensor]) -> None:
        self._numbers, self._sequence = numbers, sequence

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = self._sequence(self._numbers[row])
        return {"tokens": tokens, "position_ids": torch.arange(len(tokens))}


def teacher(r: CacheTeacherRecipe, prepared: Prepared) -> OneLayer:
    """The teacher, one layer of it in memory."""
    return one_layer(r, prepared.teacher)


def loss(r: CacheTeacherRecipe, prepared: Prepared, one: OneLayer, samples: int, states: Path) -> float:
    """The teacher's own loss over held-out sequences, in nats a token: before hours are spent on one that guesses.

    Args:
        states: a directory for residual states and progress.

    Raises:
        InputError: it guesses.
    """
    valid = held_out(r, prepared.data, samples)
    identity = _identity(r, prepared, samples)
    found = streamed_loss(r, prepared.teacher, one, valid, states / "loss", identity, "teacher")
    return checked(found.nats, prepared.data, f"teacher={r.teacher}")


def write_states(
    r: CacheTeacherRecipe,
    prepared: Prepared,
    one: OneLayer,
    sequence: Callable[[int], Tensor],
    states: Path,
) -> LayerStream:
    """Write the shards of a cache, and the teacher's output layer where the form keeps it.

    A run that was killed goes on at the layer that it was in; in the last one, at the shard.

    Args:
        sequence: the tokens int64 [s] of a sequence by its number.
        states: a directory for residual states and progress.

    Returns:
        The stream, which says how long each layer took.
    """
    plan, place = prepared.plan, states / "cache"
    kinds = [
        Samples(f"shard-{number}", _Sequences(numbers, sequence), len(numbers))
        for number, numbers in enumerate(plan.shards)
    ]
    stream = stream_of(r, one, kinds, place, _identity(r, prepared), "caching")
    stream.run(kinds, lambda *asked: _look(plan, one, kinds, *asked))
    if not plan.is_whole():  # files were removed since an earlier run was through
        remove(place)
        stream.run(kinds, lambda *asked: _look(plan, one, kinds, *asked))
    return stream


def _look(
    plan: CachePlan,
    one: OneLayer,
    kinds: Sequence[Samples],
    number: int,
    model: Any,
    send: Callable[..., None],
) -> Figures:
    """All shards through a layer; after the last one they are written."""
    if number < one.layers - 1:
        for kind in kinds:
            send(kind.name)
        return {}
    if plan.contents.form == "hidden":
        plan.write_head(head_of(model, plan.contents))
    keep, done = keeper(plan.contents, model), plan.finished()
    for shard, kind in enumerate(kinds):
        if shard not in done:
            plan.write_shard(shard, *_kept(kind.name, send, keep))
    return {}


def _kept(name: str, send: Callable[..., None], keep: Keep) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens [n, s] of a shard, and what is kept of its final hidden states, each tensor [n, ...]."""
    tokens: list[Tensor] = []
    found: list[dict[str, Tensor]] = []

    def take(batch: dict[str, Tensor], normed: Tensor) -> None:
        tokens.append(batch["tokens"])
        found.append(keep(normed))

    send(name, take)
    return torch.cat(tokens), {key: torch.cat([each[key] for each in found]) for key in found[0]}


def _identity(r: CacheTeacherRecipe, prepared: Prepared, *more: Any) -> str:
    """All that decides states and figures."""
    plan, t = prepared.plan.to_dict(), r.trainer
    plan["contents"].pop("teacher")  # where it lies
    return hashlib.sha256(json.dumps([plan, t.precision, t.micro_batch_size, *more]).encode()).hexdigest()
