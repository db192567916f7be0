"""Which targets are refused, and what fractions mean."""

import pytest

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import check_target, resolve_target
from nemo_minitron.pruning.target import rounded_from

LLAMA_31_8B = Architecture(32, 4096, 14336, 32, 8, 128, 128256)
SMALL = Architecture(8, 256, 688, 8, 4, 32, 512)
MHA = Architecture(
    4, 64, 256, 8, 8, 8, 128, gated_linear_unit=False, normalization="LayerNorm", activation="gelu"
)


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        ({"hidden_size": 257}, {}, r"hidden_size=257: larger than the source's 256"),
        ({"num_layers": 9}, {}, r"num_layers=9: larger than the source's 8"),
        ({"num_query_groups": 2}, {}, r"4 heads a group, more than the source's 2"),
        ({"kv_channels": 16}, {}, r"kv_channels=16: pruning keeps the source's 32"),
        ({"vocab_size": 256}, {}, r"vocab_size=256: pruning keeps the source's 512"),
        ({"normalization": "LayerNorm"}, {}, r"normalization='LayerNorm': pruning keeps"),
        (
            {"ffn_hidden_size": 345},
            {"tp": 2},
            r"ffn_hidden_size=345: not divisible by tensor_model_parallel_",
        ),
        (
            {"ffn_hidden_size": 3},
            {"tp": 4},
            r"ffn_hidden_size=3: leaves 1 of 4 tensor-parallel ranks empty; tensor_model_parallel_size can be 1 for",
        ),
        (
            {"num_query_groups": 3, "num_attention_heads": 6},
            {"tp": 2},
            r"num_query_groups=3: not divisible by tensor_model_parallel_size=2",
        ),
        ({"num_layers": 3}, {"pp": 2}, r"num_layers=3: not divisible by the stages"),
        ({"num_layers": 2}, {"pp": 4}, r"num_layers=2: leaves 2 of 4 stages empty"),
        ({"num_layers": 6}, {"pp": 2, "vp": 2}, r"num_layers=6: not divisible by the stages .*virtual 2"),
    ],
)
def test_impossible_targets_are_named(sizes: dict, layout: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_target(SMALL, SMALL.replace(**sizes), **layout)
    assert "\n" not in str(caught.value)


def test_what_a_fraction_was_rounded_from() -> None:
    """By hand: 3/4 of 576 is 432, 9/14 of 1536 is 987.43, the legal step of both 64; a half of 8 heads is exact."""
    source = Architecture(30, 576, 1536, 9, 3, 64, 49152)
    sizes = {"hidden_size": "3/4", "ffn_hidden_size": "9/14", "num_layers": 0.5, "num_query_groups": 3}
    target = resolve_target(source, sizes)
    assert (target.hidden_size, target.ffn_hidden_size, target.num_layers) == (448, 960, 15)
    assert rounded_from(source, target, sizes) == {"hidden_size": 432.0, "ffn_hidden_size": 987.43}
    assert rounded_from(source, source, {"hidden_size": 576, "num_layers": None}) == {}


def test_the_source_itself_and_every_legal_cut_pass() -> None:
    check_target(SMALL, SMALL, tp=4, pp=8)
    check_target(SMALL, SMALL.replace(num_layers=4, hidden_size=1, num_attention_heads=4), tp=4, pp=4)
    # A pipeline that is uneven already stays as it is while no layer goes.
    check_target(SMALL, SMALL.replace(hidden_size=128), pp=3)


def test_the_papers_ratios_give_the_papers_sizes() -> None:
    width = resolve_target(LLAMA_31_8B, {"hidden_size": "3/4", "ffn_hidden_size": "9/14", "num_layers": None})
    assert (width.hidden_size, width.ffn_hidden_size) == (3072, 9216)
    assert (width.num_attention_heads, width.kv_channels, width.num_layers) == (32, 128, 32)
    assert round(width.parameters() / 1e9, 2) == 4.51
    depth = resolve_target(LLAMA_31_8B, {"num_layers": 0.5})
    assert depth == LLAMA_31_8B.replace(num_layers=16)
    assert round(depth.parameters() / 1e9, 2) == 4.54


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"ffn_hidden_size": "9/14"}, {"ffn_hidden_size": 448}),  # 442.3, in steps of 16
        ({"hidden_size": 0.75}, {"hidden_size": 192}),
        ({"hidden_size": 0.001}, {"hidden_size": 16}),
        ({"hidden_size": 1.0}, {}),
        ({"hidden_size": 100}, {"hidden_size": 100}),  # A size is taken at its word.
        ({"num_attention_heads": 0.5}, {"num_attention_heads": 4}),
        ({"num_query_groups": 2}, {"num_query_groups": 2, "num_attention_heads": 4}),
        (
            {"num_query_groups": "1/2", "num_attention_heads": "1/4"},
            {"num_query_groups": 2, "num_attention_heads": 2},
        ),
        ({"num_layers": "2/3"}, {"num_layers": 5}),
    ],
)
def test_fractions_round_to_legal_sizes(sizes: dict, expected: dict) -> None:
    assert resolve_target(SMALL, sizes) == SMALL.replace(**expected)


def test_heads_of_multi_head_attention_are_their_own_groups() -> None:
    expected = MHA.replace(num_attention_heads=6, num_query_groups=6)
    assert resolve_target(MHA, {"num_attention_heads": 6}) == expected
    assert resolve_target(MHA, {"num_attention_heads": 0.75}) == expected
    assert resolve_target(MHA, {"num_query_groups": 6}) == expected


@pytest.mark.parametrize(
    "value",
    [True, -0.5, 0.0, 1.5, float("nan"), float("inf"), "1/0", "3072", "half", "1e-999999999", [1], 0, -4],
)
def test_values_that_are_no_size_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="hidden_size="):
        resolve_target(SMALL, {"hidden_size": value})  # type: ignore[dict-item]


def test_groups_that_are_none_are_named_as_such() -> None:
    """Not by the heads that would follow from them."""
    with pytest.raises(InputError, match=r"^num_query_groups=-1: must be a positive integer"):
        resolve_target(SMALL, {"num_query_groups": -1})


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(InputError, match=r"kv_channels: no axis that can be pruned; those are hidden_size"):
        resolve_target(SMALL, {"kv_channels": 16})


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [(4096, "3/4", 3072), (4096, "9/14", 2560), (576, "3/4", 512), (576, "1/9", 256)],
)
def test_a_multiple_for_the_blocks_of_a_quantiser(size: int, fraction: str, expected: int) -> None:
    source = LLAMA_31_8B.replace(hidden_size=size)
    found = resolve_target(source, {"hidden_size": fraction}, 256)
    assert found == source.replace(hidden_size=expected)
    assert resolve_target(source, {"hidden_size": 1.0}, 256) == source
    assert resolve_target(source, {"hidden_size": 100}, 256).hidden_size == 100
    with pytest.raises(InputError, match="multiple_of=8192: larger than the source's hidden_size"):
        resolve_target(source, {"hidden_size": fraction}, 8192)
