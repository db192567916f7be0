"""Depth: kept layers move point to point between pipeline stages, so that the stages are even again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_minitron import parallel
from nemo_minitron.pruning.width import Attributes

# A layer's parameters by their names inside the layer.
LayerParameters = dict[str, Parameter]


@dataclass(frozen=True)
class _Description:
    """What a stage must know of a parameter before it arrives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    attributes: Attributes


def move_layers(held: dict[int, LayerParameters], wanted: list[int], device: torch.device) -> None:
    """Move layers between pipeline stages, in place: afterwards `held` has the layers in `wanted`.

    One layer at a time; a stage gives its layers away before it takes others in, so it never holds more
    than one layer beyond what it starts or ends with. Every rank of the pipeline group has to call this.

    Args:
        held: this stage's layers by their number in the target (0-based), sharded over tensor-parallel ranks.
        wanted: the target's layers that this stage is to hold.
        device: where incoming parameters go.
    """
    stages = parallel.gather_over_pp((sorted(held), wanted))
    origin = {layer: stage for stage, (layers, _) in enumerate(stages) for layer in layers}
    destination = {layer: stage for stage, (_, layers) in enumerate(stages) for layer in layers}
    assert sorted(origin) == sorted(destination), f"held {sorted(origin)}, wanted {sorted(destination)}"
    moving = [layer for layer in sorted(origin) if origin[layer] != destination[layer]]
    mine = {layer: _describe(held[layer]) for layer in moving if layer in held}
    known = {layer: what for part in parallel.gather_over_pp(mine) for layer, what in part.items()}
    earlier = [layer for layer in moving if destination[layer] < origin[layer]]
    later = [layer for layer in reversed(moving) if destination[layer] > origin[layer]]
    for layer in earlier + later:
        _move(layer, held, origin[layer], destination[layer], known[layer], device)


def _describe(layer: LayerParameters) -> dict[str, _Description]:
    return {name: _Description(tuple(p.shape), p.dtype, Attributes.of(p)) for name, p in layer.items()}


def _move(
    layer: int,
    held: dict[int, LayerParameters],
    origin: int,
    destination: int,
    known: dict[str, _Description],
    device: torch.device,
) -> None:
    stage = parallel.pp_rank()
    if stage == origin:
        sent = held.pop(layer)
        parallel.exchange_pp([(destination, sent[name].detach().contiguous()) for name in known], [])
    elif stage == destination:
        arrived: dict[str, Tensor] = {
            name: torch.empty(what.shape, dtype=what.dtype, device=device) for name, what in known.items()
        }
        parallel.exchange_pp([], [(origin, arrived[name]) for name in known])
        held[layer] = {name: what.attributes.put_on(arrived[name]) for name, what in known.items()}


def renumbered(config: Any, kept: list[int]) -> None:
    """Fit a Megatron config to the kept layers: their number, lists with one entry a layer, no stage splits.

    Args:
        config: a TransformerConfig (megatron-core@0.13.1), changed in place.
        kept: the source's layers that stay, 0-based, ascending.
    """
    for name in ("no_rope_freq", "cp_comm_type"):
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == config.num_layers:
            setattr(config, name, [values[layer] for layer in kept])
    config.num_layers = len(kept)
    # Splits that were made for the old number of layers; the kept layers are spread evenly.
    config.num_layers_in_first_pipeline_stage = None
    config.num_layers_in_last_pipeline_stage = None
    config.account_for_embedding_in_pipeline_split = False
    config.account_for_loss_in_pipeline_split = False
    config.pipeline_model_parallel_layout = None
