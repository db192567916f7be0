"""A path through layers by hand, in plain transformers; and on ranks, in Megatron's GPTModel."""

import copy
from typing import Any

import torch
from torch import Tensor

Slots = list[tuple[int, int, float]]


def by_hand(models: list[Any], slots: Slots, tokens: Tensor) -> Tensor:
    """Logits of a transformers model whose layers are copies of others', each behind a multiplication."""
    made = copy.deepcopy(models[0])
    layers = []
    for model, layer, scale in slots:
        one = copy.deepcopy(models[model].model.layers[layer])
        one.register_forward_pre_hook(scaling(scale), with_kwargs=True)
        layers.append(one)
    made.model.layers = torch.nn.ModuleList(layers)
    made.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        return made(tokens, use_cache=False).logits


def scaling(scale: float) -> Any:
    def hook(_: Any, given: Any, named: Any) -> Any:
        if given:
            return (given[0] * scale, *given[1:]), named
        return given, {**named, "hidden_states": named["hidden_states"] * scale}

    return hook


def of_megatron(
    directories: list[str], text: str, tokens: Tensor, sizes: dict[str, Any], walk: bool
) -> tuple[Tensor, int]:
    """Logits of a path under a layout, and how many of the rank's layers are another's.

    Args:
        sizes: of `ranks.layout`.
        walk: whether the path is walked in a model of all layers, not laid out.
    """
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.merging.megatron import fill
    from nemo_minitron.merging.models import opened
    from nemo_minitron.merging.path import (
        Laid,
        every_layer,
        read_path,
        scale_inputs,
        share_layers,
        walking,
    )
    from tests.support.ranks import layout
    from tests.support.reference import forward_logits, tiny_model

    at = layout(**sizes)
    sources = [find_source(directory) for directory in directories]
    readers = [opened(source, directory) for source, directory in zip(sources, directories, strict=True)]
    layers = [source.architecture.num_layers for source in sources]
    path = read_path(text, layers)
    laid = Laid(every_layer(layers) if walk else path, readers, sources[0].architecture, folded=False)
    model = tiny_model(laid.architecture, sequence_parallel=at.sp)
    shared = 0 if walk else share_layers([model], path)
    fill([model], laid)
    if walk:
        with walking(model, path, [sum(layers[:number]) for number in range(len(layers))]):
            return forward_logits(model, tokens), shared
    scale_inputs([model], path)
    return forward_logits(model, tokens), shared
