"""A Hugging Face directory whose layers samples go through one by one, and its loss on held-out text."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.config.recipes import CommonConfig
from nemo_minitron.data.prepare import PreparedData
from nemo_minitron.evaluation.lm_loss import LMLoss
from nemo_minitron.evaluation.token_scores import Head, token_scores
from nemo_minitron.export.huggingface_reader import HuggingFaceReader
from nemo_minitron.megatron_gpt import output_weight
from nemo_minitron.nemo.session import packed
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.layer_stream import Figures, LayerStream, Samples, passes
from nemo_minitron.workflows.one_layer import OneLayer

VALID = "valid"


def held_out(r: CommonConfig, data: PreparedData, samples: int | None) -> Samples:
    """The first `samples` packed sequences of the valid split; None: all of one pass."""
    valid = packed(data, r.data, "valid")
    return Samples(VALID, valid, min(samples or len(valid), len(valid)))


def one_layer(r: CommonConfig, source: Source) -> OneLayer:
    """The model, of kind "huggingface", with one layer in memory and the next one on its way."""
    arch = source.architecture
    gc.collect()  # an earlier model of this process refers to itself, and has gigabytes
    return OneLayer(
        source,
        HuggingFaceReader(arch, TensorFiles(source.path, arch, f"source={source.path}")),
        vocab_rows=arch.vocab_size,
        precision=r.trainer.precision,
    )


def stream_of(
    r: CommonConfig, one: OneLayer, kinds: list[Samples], directory: Path, identity: str, label: str
) -> LayerStream:
    """A stream through a model's layers, with progress.

    Args:
        kinds: that will be sent.
        directory, identity: as of `LayerStream`.
    """
    return LayerStream(
        one,
        directory,
        identity,
        seq_length=r.data.seq_length,
        micro_batch_size=r.trainer.micro_batch_size,
        progress=progress_bar(label, passes(kinds, one.layers), unit="samples x layers"),
    )


def loss_through(
    model: Any,
    source: Source,
    send: Callable[..., None],
    final: bool,
    kind: str = VALID,
    past: str | None = None,
) -> Figures:
    """Send samples through a layer; after the last one, the sum of their losses and how many tokens.

    Args:
        kind, past: as `LayerStream` sends them.
    """
    if not final:
        send(kind, past=past)
        return {}
    sums = torch.zeros(2, dtype=torch.float64)
    head = Head(output_weight(model), source.architecture.vocab_size)

    def take(batch: dict[str, Tensor], normed: Tensor) -> None:
        mask = batch["loss_mask"].flatten()
        hidden = normed.transpose(0, 1).flatten(0, 1)
        losses = -token_scores(hidden, head, batch["labels"].flatten()).log_probs
        sums.add_(torch.stack([(losses * mask).sum(), mask.sum()]).double())

    send(kind, take, past)
    return {f"{kind}/loss": sums}


def loss_of(figures: Figures, kind: Samples) -> LMLoss:
    """The loss out of what `loss_through` found, which is taken out of the figures."""
    total, tokens = figures.pop(f"{kind.name}/loss")
    return LMLoss(float(total / tokens), int(tokens), kind.count)


def streamed_loss(
    r: CommonConfig,
    source: Source,
    one: OneLayer,
    valid: Samples,
    directory: Path,
    identity: str,
    label: str,
) -> LMLoss:
    """The loss on held-out text, and nothing else.

    Args:
        source, one: the model.
        valid: of `held_out`.
        directory, identity: as of `LayerStream`.
    """

    def look(number: int, model: Any, send: Callable[..., None]) -> Figures:
        return loss_through(model, source, send, number == one.layers - 1)

    return loss_of(stream_of(r, one, [valid], directory, identity, label).run([valid], look), valid)
