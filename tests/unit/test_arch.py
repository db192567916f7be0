"""The architecture: counts against models that are really built, the published sizes, refusals."""

import pytest

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from tests.support.pruning_models import FAMILIES
from tests.support.reference import full_weights

LLAMA_8B = Architecture(32, 4096, 14336, 32, 8, 128, vocab_size=128256)
TINY = {
    "narrow": Architecture(2, 8, 12, 4, 2, 6, vocab_size=10),
    **FAMILIES,
}


@pytest.mark.parametrize("arch", TINY.values(), ids=TINY)
def test_counts_are_those_of_the_weights(arch):
    weights = full_weights(arch)
    assert arch.parameters() == sum(w.numel() for w in weights.values())
    inner = [w for n, w in weights.items() if n.startswith("decoder.")]
    assert arch.non_embedding_parameters() == sum(w.numel() for w in inner)


@pytest.mark.parametrize("arch", TINY.values(), ids=TINY)
def test_megatrons_own_model_has_as_many_parameters(arch, megatron):
    from tests.support.reference import tiny_model

    assert sum(p.numel() for p in tiny_model(arch).parameters()) == arch.parameters()


def test_published_sizes():
    """arXiv 2408.11796, table 1: billions of parameters, all and without embeddings."""
    width = LLAMA_8B.replace(hidden_size=3072, ffn_hidden_size=9216)
    depth = LLAMA_8B.replace(num_layers=16)
    published = {LLAMA_8B: (8.03, 6.98), width: (4.51, 3.72), depth: (4.54, 3.49)}
    for arch, counts in published.items():
        assert (round(arch.parameters() / 1e9, 2), round(arch.non_embedding_parameters() / 1e9, 2)) == counts


def test_kv_channels_stay_when_hidden_size_is_pruned():
    pruned = LLAMA_8B.replace(hidden_size=3072)
    assert (pruned.kv_channels, pruned.query_size, pruned.key_value_size) == (128, 4096, 1024)


def test_flops_are_two_for_each_weight_and_score():
    arch = TINY["narrow"]
    matrices = [w.numel() for n, w in full_weights(arch).items() if w.dim() == 2 and "embedding" not in n]
    attention = arch.num_layers * 2 * 7 * arch.query_size  # scores and mixing of 7 tokens' keys and values
    assert arch.flops_per_token(7) == 2 * (sum(matrices) + attention)


def test_dict_round_trip_refuses_what_it_does_not_know():
    assert Architecture.from_dict(LLAMA_8B.to_dict()) == LLAMA_8B
    with pytest.raises(InputError, match="unknown key 'layers'"):
        Architecture.from_dict({**LLAMA_8B.to_dict(), "layers": 3})
    with pytest.raises(InputError, match="vocab_size"):
        Architecture.from_dict({k: v for k, v in LLAMA_8B.to_dict().items() if k != "vocab_size"})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "num_layers=0: must be a positive integer"),
        ({"hidden_size": 12.0}, "hidden_size=12.0"),
        ({"kv_channels": True}, "kv_channels=True"),
        ({"activation": "relu"}, "activation='relu': must be one of silu, gelu, gelu_tanh, squared_relu"),
        ({"num_query_groups": 5}, "num_attention_heads=32 is not divisible by num_query_groups=5"),
    ],
)
def test_illegal_sizes_are_named(sizes, message):
    with pytest.raises(InputError, match=message):
        LLAMA_8B.replace(**sizes)
