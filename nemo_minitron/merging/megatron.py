"""Hugging Face tensors into Megatron GPT models that are there already, sharded as they are: each rank takes its part.

The other way round, and a checkpoint's names, are in `export.tensors`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.arch import Architecture
from nemo_minitron.export.tensors import EMBEDDING, Part
from nemo_minitron.megatron_gpt import gpt_model
from nemo_minitron.merging.models import Tensors

_LAYERS = "module.decoder.layers."
_OUTSIDE = "module."
_HEAD = "module.output_layer.weight"
# Norms that Transformer Engine keeps in the linear layer after them have names of their own without it.
_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_BY_ROWS = (EMBEDDING, _HEAD)


@torch.no_grad()
def fill(chunks: Sequence[Any], weights: Tensors) -> None:
    """Copy a model's weights into this rank's Megatron GPTModels; every rank may call it by itself.

    A tensor is read once a rank that holds a part of it, and is in memory alone.

    Args:
        chunks: this rank's GPTModels of that architecture, under any tensor- and pipeline-parallel layout.
        weights: whole tensors, in any floating dtype.
    """
    a = weights.architecture
    for chunk in chunks:
        model = gpt_model(chunk)
        for part, parameter in _targets(model, weights):
            tensor = weights.read(part.name).to(parameter.dtype)
            _copy(parameter, tensor, part, a)


def _targets(model: Any, weights: Tensors) -> Iterator[tuple[Part, Tensor]]:
    """Each tensor of which this model holds a part, with the parameter that it goes to."""
    layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
    for part in weights.parts.values():
        if part.layer is not None:
            if part.layer in layers:
                yield part, _parameter(layers[part.layer], part.key.removeprefix(_LAYERS))
            continue
        if (parameter := _outside(model, part.key)) is not None:
            yield part, parameter
        tied_copy = part.key == EMBEDDING and model.share_embeddings_and_output_weights
        # The last of several stages has a copy of a tied table.
        if tied_copy and model.post_process and not model.pre_process:
            yield part, model.output_layer.weight


def _outside(model: Any, key: str) -> Tensor | None:
    """A parameter beside the layers; None on a stage that has none of this name."""
    found: Any = model
    for name in key.removeprefix(_OUTSIDE).split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def _parameter(layer: Any, name: str) -> Tensor:
    parameters = dict(layer.named_parameters())
    if name not in parameters:
        for fused, local in _LOCAL_NORMS.items():
            name = name.replace(fused, local)
    return parameters[name]


def _copy(parameter: Tensor, tensor: Tensor, part: Part, a: Architecture) -> None:
    rank, ranks = parallel.tp_rank(), parallel.tp_size()
    if part.key in _BY_ROWS:
        rows = tensor[rank * len(parameter) : (rank + 1) * len(parameter)]
        parameter[: len(rows)] = rows  # rows that pad the vocabulary stay zero
    elif part.part in ("q", "k", "v"):
        # [groups of the rank, queries of a group + key + value, head dimension, ...]
        local = parameter.view(-1, a.heads_per_group + 2, a.kv_channels, *parameter.shape[1:])
        cut = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[part.part]
        whole = tensor.view(a.num_query_groups, -1, a.kv_channels, *tensor.shape[1:])
        local[:, cut] = whole.chunk(ranks)[rank]
    elif part.part in ("gate", "up"):
        half = len(parameter) // 2
        begin = 0 if part.part == "gate" else half
        parameter[begin : begin + half] = tensor.chunk(ranks)[rank]
    elif part.key.endswith("linear_fc1.weight"):
        parameter.copy_(tensor.chunk(ranks)[rank])
    elif part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        parameter.copy_(tensor.chunk(ranks, dim=1)[rank])
    else:
        parameter.copy_(tensor)
