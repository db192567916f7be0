"""Where in a Megatron GPT the activations are that scores stand on, found by structure.

Works on megatron-core's local layer spec and on the Transformer Engine spec, whose norms sit inside the fused
`linear_qkv` and `linear_fc1` (tried on a stand-in of the same shape: Transformer Engine needs CUDA).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from nemo_minitron.errors import InputError
from nemo_minitron.megatron_gpt import layers_of

# In the order in which a layer meets them; a site's position is 4 * layer + the index here.
PLACES = (
    "output of input_layernorm",
    "input of self_attention.linear_proj",
    "output of pre_mlp_layernorm",
    "input of mlp.linear_fc2",
)


@dataclass(frozen=True)
class Site:
    """One place whose activations are read.

    Attributes:
        row: of the axis' global table: the layer's index, or the norm's (2 a layer, then the final one).
        position: global order in the network, for `describe`.
        module: the hooked one.
        at_output: whether its output is read, else its first input.
        units: maps what was read, [s, b, ...], to one activation for each unit, [s, b, n].
    """

    row: int
    position: int
    module: Module
    at_output: bool
    units: Callable[[Tensor], Tensor]


def describe(position: int, num_layers: int) -> str:
    """The place in words, layers counted from 0 as in plans."""
    if position == len(PLACES) * num_layers:
        return "output of final_layernorm"
    return f"layer {position // len(PLACES)}, {PLACES[position % len(PLACES)]}"


def ffn_sites(decoder: Any) -> list[Site]:
    """Inputs of `mlp.linear_fc2` [s, b, ffn_hidden_size/tp], after the gate.

    Raises:
        InputError: a layer whose MLP is no dense one.
    """
    sites = []
    for index, layer in layers_of(decoder):
        if not hasattr(layer.mlp, "linear_fc2"):
            raise InputError(
                f"layer {index}: its {type(layer.mlp).__name__} is no dense MLP with a linear_fc2"
            )
        sites.append(Site(index, 4 * index + 3, layer.mlp.linear_fc2, at_output=False, units=_as_it_is))
    return sites


def head_sites(decoder: Any) -> list[Site]:
    """Inputs of `self_attention.linear_proj`, as the Euclidean norm of each head's channels [s, b, heads/tp].

    Raises:
        InputError: latent attention, whose heads have other widths.
    """
    config = decoder.config
    if getattr(config, "multi_latent_attention", False):
        raise InputError("multi_latent_attention: its heads cannot be scored, only those of plain attention")

    def norms(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, config.kv_channels))
        return torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)

    return [
        Site(index, 4 * index + 1, layer.self_attention.linear_proj, at_output=False, units=norms)
        for index, layer in layers_of(decoder)
    ]


def norm_sites(decoder: Any, include_final: bool) -> list[Site]:
    """Outputs of every norm, [s, b, hidden_size], [s/tp, b, hidden_size] under sequence parallelism."""
    sites = []
    for index, layer in layers_of(decoder):
        before_attention = layer.input_layernorm, layer.self_attention.linear_qkv
        before_mlp = layer.pre_mlp_layernorm, getattr(layer.mlp, "linear_fc1", None)
        for k, (norm, linear) in enumerate((before_attention, before_mlp)):
            sites.append(_norm_site(2 * index + k, 4 * index + 2 * k, norm, linear, decoder.config))
    if include_final and decoder.final_layernorm is not None:
        layers = decoder.config.num_layers
        sites.append(Site(2 * layers, 4 * layers, decoder.final_layernorm, at_output=True, units=_as_it_is))
    return sites


def _norm_site(row: int, position: int, norm: Module, linear: Any, config: Any) -> Site:
    if getattr(linear, "layer_norm_weight", None) is not None:
        return Site(row, position, linear, at_output=False, units=_fused_norm(linear, config))
    if not hasattr(norm, "weight"):
        raise InputError(
            f"{describe(position, config.num_layers)}: there is no norm, nor one fused into the linear"
        )
    return Site(row, position, norm, at_output=True, units=_as_it_is)


def _fused_norm(linear: Any, config: Any) -> Callable[[Tensor], Tensor]:
    """The norm that a fused linear applies to its input: it never shows the result, so it is made again."""
    eps = getattr(linear, "eps", config.layernorm_epsilon)
    offset = 1 if config.layernorm_zero_centered_gamma else 0

    def norm(x: Tensor) -> Tensor:
        weight = linear.layer_norm_weight + offset if offset else linear.layer_norm_weight
        if config.normalization == "RMSNorm":
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.layer_norm(x, x.shape[-1:], weight, linear.layer_norm_bias, eps)

    return norm


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _dense(find: Callable[[Any], list[Site]]) -> Callable[[Any, bool], list[Site]]:
    return lambda decoder, include_final: find(decoder)


@dataclass(frozen=True)
class Kind:
    """A kind of place that is hooked.

    Attributes:
        sites: of a decoder; the flag says whether the final norm counts.
        axis: the one whose units are measured there; others that share the place sum them up.
        positions: of `num_layers`: the place (see `describe`) of each row of the kind's table.
        spread_by_sequence_parallel: whether tensor-parallel ranks hold other tokens there under sequence parallelism.
    """

    sites: Callable[[Any, bool], list[Site]]
    axis: str
    positions: Callable[[int], range]
    spread_by_sequence_parallel: bool = False


KINDS = {
    "ffn": Kind(_dense(ffn_sites), "ffn_hidden_size", lambda layers: range(3, 4 * layers, 4)),
    "heads": Kind(_dense(head_sites), "num_attention_heads", lambda layers: range(1, 4 * layers, 4)),
    "norms": Kind(norm_sites, "hidden_size", lambda layers: range(0, 4 * layers + 1, 2), True),
}
