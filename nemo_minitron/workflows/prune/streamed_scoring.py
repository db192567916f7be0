"""Scores and losses of a model that no memory here holds: all samples go through one layer, then through the next."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.importance.aggregation import Statistic
from nemo_minitron.importance.block_influence import BlockInfluenceCollector
from nemo_minitron.importance.collectors import ImportanceCollector
from nemo_minitron.importance.depth_metrics import layers_by_loss
from nemo_minitron.importance.scores import Scores
from nemo_minitron.nemo.session import packed
from nemo_minitron.workflows.layer_stream import Figures, Samples
from nemo_minitron.workflows.preflight import STATES
from nemo_minitron.workflows.prune.streamed_check import StreamedPrepared
from nemo_minitron.workflows.streamed_model import (
    held_out,
    loss_of,
    loss_through,
    one_layer,
    stream_of,
    streamed_loss,
)

_TRAIN = "train"


def before(r: PruneRecipe, prepared: StreamedPrepared, directory: Path) -> tuple[Scores, dict[str, Any]]:
    """The scores of every width axis and layer, and the loss on held-out text, in one pass over the layers.

    Args:
        directory: the run's; residual states are kept below it until the run is done.

    Returns:
        The scores, and fields of `result.json`.

    Raises:
        InputError: NaN or infinity in the activations.
    """
    source, data = prepared.source, prepared.data
    assert data is not None
    train = Samples(_TRAIN, packed(data, r.data, "train"), r.prune.calibration_samples)
    valid = held_out(r, data, r.eval.samples)
    without = _without(train, source.architecture.num_layers) if prepared.by_removal(r.prune) else []
    kinds = [train, valid, *without]
    identity = _identity(r, prepared, prepared.source_sha256)
    one = one_layer(r, source)
    stream = stream_of(r, one, kinds, directory / STATES / "before", identity, "scoring")
    figures = stream.run(kinds, lambda *asked: _look(r, source, without, *asked))
    loss = loss_of(figures, valid)
    if without:
        losses = [loss_of(figures, kind).nats for kind in without]
        figures |= layers_by_loss(torch.tensor(losses, dtype=torch.float64))
    return _scores(r, prepared, figures), {
        "data": r.data.name,
        "data_sha256": data.indexed.manifest_sha256,
        "lm_loss_nats_before": loss.nats,
        "eval_samples": loss.samples,
        "eval_tokens": loss.tokens,
        **stream.facts(),
    }


def _without(train: Samples, layers: int) -> list[Samples]:
    """The calibration samples as they are without each layer: until then they are those of the whole model."""
    return [replace(train, name=f"without-{left_out}", begin=left_out) for left_out in range(layers)]


def _look(
    r: PruneRecipe,
    source: Source,
    without: list[Samples],
    number: int,
    model: Any,
    send: Callable[..., None],
) -> Figures:
    """What is made of a layer: its units' scores, its own, and after the last one the losses."""
    final = number == source.architecture.num_layers - 1
    units = ImportanceCollector(
        [model],
        batch=cast(Statistic, r.prune.batch_aggregation),
        sequence=cast(Statistic, r.prune.sequence_aggregation),
        include_final_norm=final and r.prune.include_final_norm,
    )
    blocks = BlockInfluenceCollector([model])
    with units, blocks:
        send(_TRAIN)
    figures = units.finish() | blocks.finish() | loss_through(model, source, send, final)
    for kind in without[: number + 1]:
        past = _TRAIN if kind.begin == number else None
        figures |= loss_through(model, source, send, final, kind.name, past)
    return figures


def _scores(r: PruneRecipe, prepared: StreamedPrepared, figures: Figures) -> Scores:
    assert prepared.data is not None
    return Scores(
        architecture=prepared.source.architecture,
        source_sha256=prepared.source_sha256,
        batch=r.prune.batch_aggregation,
        sequence=r.prune.sequence_aggregation,
        samples=r.prune.calibration_samples,
        tokens=r.prune.calibration_samples * r.data.seq_length,
        data_sha256=prepared.data.indexed.manifest_sha256,
        tensors={name: tensor.float() for name, tensor in figures.items()},
    )


def after(r: PruneRecipe, prepared: StreamedPrepared, state: str, directory: Path) -> dict[str, Any]:
    """The student's loss on held-out text.

    Args:
        state: says which student the run directory holds.
    """
    assert prepared.data is not None
    student = find_source(directory / CHECKPOINT, "checkpoint")
    valid, place = held_out(r, prepared.data, r.eval.samples), directory / STATES / "after"
    identity = _identity(r, prepared, state)
    loss = streamed_loss(r, student, one_layer(r, student), valid, place, identity, "loss after")
    return {"lm_loss_nats_after": loss.nats}


def _identity(r: PruneRecipe, prepared: StreamedPrepared, weights: str) -> str:
    """All that decides states and figures; `weights`: what names those of the model."""
    assert prepared.data is not None
    d, p, t = r.data, r.prune, r.trainer
    values = [
        *(weights, prepared.data.indexed.manifest_sha256),
        *(d.seq_length, d.seed, d.reset_attention_mask, d.reset_position_ids),
        *(t.precision, t.micro_batch_size, r.eval.samples, prepared.by_removal(p)),
        *(p.calibration_samples, p.batch_aggregation, p.sequence_aggregation, p.include_final_norm),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
