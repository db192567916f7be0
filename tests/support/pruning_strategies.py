"""Random models and random ways to prune them, for property tests."""

from hypothesis import strategies as st

from nemo_minitron.arch import Architecture
from nemo_minitron.pruning import Kept
from tests.support.pruning_models import FAMILIES


@st.composite
def architectures(draw: st.DrawFn, tp: int = 1, pp: int = 1) -> Architecture:
    """Any small model that the layout can hold."""
    groups = tp * draw(st.integers(1, 4 // tp))
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    return family.replace(
        num_layers=pp * draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(8, 24)),
        ffn_hidden_size=tp * draw(st.integers(1, 24 // tp)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        # Half of them, where only half is rotated, must be even: of an odd number Megatron rotates one more.
        kv_channels=draw(st.sampled_from([4, 8, 12])),
        vocab_size=8,
    )


@st.composite
def kept_sets(draw: st.DrawFn, source: Architecture) -> tuple[dict[str, int], Kept]:
    """Any sizes, and any legal way to keep that many."""

    def subset(total: int, size: int) -> list[int]:
        return sorted(draw(st.permutations(range(total)))[:size])

    sizes = {
        "num_layers": draw(st.integers(1, source.num_layers)),
        # A norm over two or three channels that happen to be close divides by almost nothing.
        "hidden_size": draw(st.integers(6, source.hidden_size)),
        "ffn_hidden_size": draw(st.integers(1, source.ffn_hidden_size)),
        "num_query_groups": draw(st.integers(1, source.num_query_groups)),
    }
    in_group = draw(st.integers(1, source.heads_per_group))
    sizes["num_attention_heads"] = sizes["num_query_groups"] * in_group
    layers = range(sizes["num_layers"])
    groups = [subset(source.num_query_groups, sizes["num_query_groups"]) for _ in layers]
    per_group = source.heads_per_group
    heads = [[g * per_group + h for g in kept for h in subset(per_group, in_group)] for kept in groups]
    return sizes, Kept(
        layers=subset(source.num_layers, sizes["num_layers"]),
        hidden_size=subset(source.hidden_size, sizes["hidden_size"]),
        ffn_hidden_size=[subset(source.ffn_hidden_size, sizes["ffn_hidden_size"]) for _ in layers],
        num_query_groups=groups,
        num_attention_heads=heads,
    )
