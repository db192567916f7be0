"""Our scores by (batch l2, sequence mean) beside ModelOpt's, from its own hooks on the same model and tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.importance import BlockInfluenceCollector, ImportanceCollector
from tests.support.expected_scores import aggregate
from tests.support.modelopt import modelopt_scores
from tests.support.pruning_models import FAMILIES
from tests.support.reference import Reference, forward_logits, full_weights, tiny_model

pytestmark = pytest.mark.usefixtures("megatron")
PASSES = 3


def both(arch: Architecture) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], Tensor]:
    """Ours, ModelOpt's, our layer scores, and the tokens; each in three forward passes of two samples."""
    tokens = torch.randint(arch.vocab_size, (2 * PASSES, 8), generator=torch.Generator().manual_seed(1))
    model = tiny_model(arch)
    with (
        ImportanceCollector([model], batch="l2", sequence="mean", include_final_norm=False) as width,
        BlockInfluenceCollector([model], [1]) as depth,
    ):
        theirs = modelopt_scores(model, lambda: forward_logits(model, tokens, 2))
    return width.finish(), theirs, depth.finish(), tokens


def ranking(scores: Tensor) -> Tensor:
    return scores.double().argsort(descending=True, dim=-1)


def group_ranking(scores: Tensor, groups: int) -> Tensor:
    """Heads [layers, heads] by their rank inside their group, group after group, as ModelOpt returns them."""
    per_group = scores.shape[-1] // groups
    first = torch.arange(0, scores.shape[-1], per_group)[:, None]
    return (ranking(scores.unflatten(-1, (groups, per_group))) + first).flatten(-2)


@pytest.mark.parametrize("family", ["llama", "gpt", "qwen3"])
def test_neurons_channels_and_layers_are_scored_alike(family: str) -> None:
    ours, theirs, layers, _ = both(FAMILIES[family])
    for axis in ("ffn_hidden_size", "hidden_size"):
        torch.testing.assert_close(ours[axis], theirs[axis], rtol=1e-5, atol=0.0)
        assert torch.equal(ranking(ours[axis]), ranking(theirs[axis]))
    # ModelOpt adds up its forward passes; all of them are as large here.
    influence = layers["layers/block_influence"]
    torch.testing.assert_close(influence * PASSES, theirs["layers"], rtol=1e-5, atol=1e-6)


def test_heads_are_scored_alike_where_a_head_is_one_channel() -> None:
    arch = FAMILIES["gpt"].replace(kv_channels=1, num_attention_heads=16, num_query_groups=4)
    ours, theirs, _, _ = both(arch)
    expected = group_ranking(ours["num_attention_heads"], arch.num_query_groups)
    assert torch.equal(theirs["num_attention_heads"], expected)


def test_where_heads_differ() -> None:
    """ModelOpt aggregates each channel and then takes the norm over a head's; we, like the paper, the other way."""
    arch = FAMILIES["llama"].replace(num_attention_heads=32, num_query_groups=2)
    ours, theirs, _, tokens = both(arch)
    reference = Reference(full_weights(arch), arch)
    reference(tokens)
    channels = torch.stack(
        [aggregate(layer["attention"].flatten(2), "l2", "mean") for layer in reference.kept]
    )
    channels_first = channels.unflatten(-1, (arch.num_attention_heads, -1)).norm(dim=-1)
    assert torch.equal(theirs["num_attention_heads"], group_ranking(channels_first, 2))
    assert not torch.equal(theirs["num_attention_heads"], group_ranking(ours["num_attention_heads"], 2))
