"""Importance scores by the papers' formulas, from the reference's activations of a whole batch at once."""

import math

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from tests.support.reference import Reference, Weights

FORMULAS = {
    "mean": lambda x, axis: np.abs(x).mean(axis),
    "l2": lambda x, axis: np.sqrt((x**2).sum(axis)),
    "var": lambda x, axis: x.var(axis),
}


def aggregate(x: Tensor, batch: str, sequence: str) -> Tensor:
    """Activations [b, s, n] to scores [n], in float64."""
    return torch.from_numpy(FORMULAS[batch](FORMULAS[sequence](x.double().numpy(), 1), 0))


def width_scores(
    weights: Weights, arch: Architecture, tokens: Tensor, batch: str, sequence: str, final_norm: bool = True
) -> dict[str, Tensor]:
    """Scores of all width axes after arXiv 2407.14679, section 2.2; tokens [b, s]."""
    reference = Reference(weights, arch)
    reference(tokens)
    layers = reference.kept
    heads = torch.stack([aggregate(layer["attention"].norm(dim=-1), batch, sequence) for layer in layers])
    norms = [layer[name] for layer in layers for name in ("norm1", "norm2")]
    norms += [reference.final_norm] if final_norm else []
    return {
        "ffn_hidden_size": torch.stack([aggregate(layer["ffn"], batch, sequence) for layer in layers]),
        "num_attention_heads": heads,
        "num_query_groups": heads.view(arch.num_layers, arch.num_query_groups, -1).sum(-1),
        "hidden_size": sum(aggregate(norm, batch, sequence) for norm in norms),
    }


def block_scores(weights: Weights, arch: Architecture, tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Block influence and angular distance of all blocks of `length` layers."""
    reference = Reference(weights, arch)
    reference(tokens)
    states = [reference.kept[0]["in"], *(layer["out"] for layer in reference.kept)]
    pairs = [(states[i].double(), states[i + length].double()) for i in range(arch.num_layers - length + 1)]
    cosines = [torch.cosine_similarity(before, after, dim=-1) for before, after in pairs]
    influence = torch.stack([1 - cosine.mean() for cosine in cosines])
    return influence, torch.stack([cosine.arccos().mean() / math.pi for cosine in cosines])
