"""What pruning has to arrive at: full weights sliced as a plan says, in plain torch, without any sharding."""

import torch
from torch import Tensor

from nemo_minitron.pruning import PrunePlan
from tests.support.reference import Weights, local_names


def slice_weights(weights: Weights, plan: PrunePlan) -> Weights:
    """The target's full weights, cut out of the source's, under the local spec's names."""
    kept, weights = plan.kept, local_names(weights)
    layers = list(range(plan.source.num_layers)) if kept.layers is None else kept.layers
    sliced = {name: value for name, value in weights.items() if not name.startswith("decoder.layers.")}
    for new, old in enumerate(layers):
        prefix = f"decoder.layers.{old}."
        layer = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        for name, value in _slice_layer(layer, plan, new).items():
            sliced[f"decoder.layers.{new}.{name}"] = value
    if kept.hidden_size is not None:
        sliced = {
            name: _hidden(name, value, torch.tensor(kept.hidden_size)) for name, value in sliced.items()
        }
    return sliced


def _slice_layer(layer: Weights, plan: PrunePlan, new: int) -> Weights:
    layer = dict(layer)
    if plan.kept.ffn_hidden_size is not None:
        neurons = torch.tensor(plan.kept.ffn_hidden_size[new])
        both = torch.cat((neurons, neurons + plan.source.ffn_hidden_size))
        rows = both if plan.source.gated_linear_unit else neurons
        for name in ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias"):
            if name in layer:
                layer[name] = layer[name][rows]
        layer["mlp.linear_fc2.weight"] = layer["mlp.linear_fc2.weight"][:, neurons]
    if plan.kept.num_attention_heads is not None:
        heads = plan.kept.num_attention_heads[new]
        for name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            if name in layer:
                layer[name] = _slice_qkv(layer[name], plan, heads)
        d, proj = plan.source.kv_channels, "self_attention.linear_proj.weight"
        layer[proj] = torch.cat([layer[proj][:, head * d : (head + 1) * d] for head in heads], dim=1)
    return layer


def _slice_qkv(qkv: Tensor, plan: PrunePlan, heads: list[int]) -> Tensor:
    """Group by group: its kept query heads, its key, its value."""
    a, rows = plan.source, []
    groups = qkv.reshape(a.num_query_groups, a.heads_per_group + 2, a.kv_channels, *qkv.shape[1:])
    for group in sorted({head // a.heads_per_group for head in heads}):
        rows += [groups[group, h % a.heads_per_group] for h in heads if h // a.heads_per_group == group]
        rows += [groups[group, a.heads_per_group], groups[group, a.heads_per_group + 1]]
    return torch.cat(rows)


def _hidden(name: str, value: Tensor, channels: Tensor) -> Tensor:
    if "q_layernorm" in name or "k_layernorm" in name:
        return value
    if "layernorm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return value[channels]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value[channels]
    if name.endswith(("linear_qkv.bias", "linear_fc1.bias")):
        return value
    return value[:, channels]
