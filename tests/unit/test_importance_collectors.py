"""Scores of Megatron's own model in one process against the reference's activations and the papers'
formulas."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.errors import InputError
from nemo_minitron.importance import BlockInfluenceCollector, ImportanceCollector
from nemo_minitron.importance.aggregation import STATISTICS
from tests.support.expected_scores import block_scores, width_scores
from tests.support.pruning_models import FAMILIES
from tests.support.reference import forward_logits, full_weights, tiny_model

pytestmark = pytest.mark.usefixtures("megatron")

LLAMA = Architecture(3, 16, 24, 8, 4, 6, vocab_size=32)
GPT = LLAMA.replace(
    num_query_groups=8,
    gated_linear_unit=False,
    normalization="LayerNorm",
    add_bias_linear=True,
    position_embedding_type="learned_absolute",
    max_position_embeddings=16,
    activation="gelu",
)


def some_tokens(arch: Architecture, b: int = 5, s: int = 8) -> torch.Tensor:
    return torch.randint(arch.vocab_size, (b, s), generator=torch.Generator().manual_seed(1))


def collect(model, tokens, micro_batch_size=2, **options):
    with ImportanceCollector([model], **options) as collector:
        forward_logits(model, tokens, micro_batch_size)
    return collector.finish(), collector


def assert_same(got, expected, rtol=1e-5):
    assert got.keys() <= expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor.double(),
            expected[name],
            rtol=rtol,
            atol=rtol * float(expected[name].abs().mean()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("fused", [False, True], ids=["local", "fused-norms"])
@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
def test_every_family_under_both_layer_specs(arch, fused):
    tokens = some_tokens(arch)
    scores, collector = collect(tiny_model(arch, fused_norms=fused), tokens)
    assert list(scores) == list(WIDTH_AXES)
    assert_same(scores, width_scores(full_weights(arch), arch, tokens, "l2", "mean"))
    assert (collector.samples, collector.tokens) == (5, 40)


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(STATISTICS, STATISTICS)))
def test_every_aggregation(batch, sequence):
    tokens = some_tokens(LLAMA)
    scores, _ = collect(tiny_model(LLAMA), tokens, batch=batch, sequence=sequence)
    assert_same(scores, width_scores(full_weights(LLAMA), LLAMA, tokens, batch, sequence), rtol=5e-5)


@st.composite
def architectures(draw) -> Architecture:
    groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer_norm = draw(st.booleans())
    return Architecture(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(6, 16)),  # a norm of fewer channels may divide by almost nothing
        ffn_hidden_size=draw(st.integers(1, 12)),
        num_attention_heads=groups * shared,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 3)),
        vocab_size=16,
        gated_linear_unit=draw(st.booleans()),
        normalization="LayerNorm" if layer_norm else "RMSNorm",
        share_embeddings_and_output_weights=draw(st.booleans()),
        add_bias_linear=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu", "squared_relu"])),
        layernorm_zero_centered_gamma=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(
    arch=architectures(),
    batch=st.sampled_from(STATISTICS),
    sequence=st.sampled_from(STATISTICS),
    micro_batch_size=st.integers(1, 4),
    fused=st.booleans(),
    axes=st.sets(st.sampled_from(WIDTH_AXES), min_size=1),
)
def test_any_architecture_and_aggregation(arch, batch, sequence, micro_batch_size, fused, axes):
    tokens = some_tokens(arch, 4, 6)
    model = tiny_model(arch, fused_norms=fused)
    options = {"axes": sorted(axes), "batch": batch, "sequence": sequence}
    scores, _ = collect(model, tokens, micro_batch_size, **options)
    assert set(scores) == axes
    expected = width_scores(full_weights(arch), arch, tokens, batch, sequence)
    if batch != "var":
        assert_same(scores, expected, rtol=2e-4)
        return
    # Samples that hardly differ: their spread is known as well as the samples' own values are, not better.
    values = width_scores(full_weights(arch), arch, tokens, "mean", sequence)
    for axis, tensor in scores.items():
        error = (tensor.double().sqrt() - expected[axis].sqrt()).abs()
        assert (error <= 2e-4 * values[axis].clamp_min(values[axis].mean())).all(), axis


def test_the_final_norm_is_a_choice():
    tokens = some_tokens(LLAMA)
    scores, _ = collect(tiny_model(LLAMA), tokens, axes=["hidden_size"], include_final_norm=False)
    weights = full_weights(LLAMA)
    assert_same(scores, width_scores(weights, LLAMA, tokens, "l2", "mean", final_norm=False))
    with_it = width_scores(weights, LLAMA, tokens, "l2", "mean")["hidden_size"]
    assert not torch.allclose(scores["hidden_size"].double(), with_it, rtol=0.05)


def test_bfloat16_model_is_scored_in_float32():
    tokens = some_tokens(LLAMA)
    scores, _ = collect(tiny_model(LLAMA, dtype=torch.bfloat16), tokens)
    weights = {name: w.float() for name, w in full_weights(LLAMA, dtype=torch.bfloat16).items()}
    expected = width_scores(weights, LLAMA, tokens, "l2", "mean")
    # The activations themselves are rounded to 8 bits.
    for name, tensor in scores.items():
        assert tensor.dtype == torch.float32
        error = (tensor - expected[name]).abs().mean() / expected[name].mean()
        assert error < 0.02, name


def test_wrappers_are_looked_through_and_nothing_is_left_behind():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = tiny_model(LLAMA)
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    before = hooks()
    with (
        ImportanceCollector([Wrapper(Wrapper(model))]) as width,
        BlockInfluenceCollector([Wrapper(model)]) as depth,
    ):
        assert hooks() != before
        forward_logits(model, some_tokens(LLAMA))
    assert hooks() == before
    assert {**width.finish(), **depth.finish()}.keys() == {
        *WIDTH_AXES,
        "layers/block_influence",
        "layers/angular_distance",
    }


def test_recomputation_in_a_backward_pass_counts_nothing_twice():
    from tests.support.reference import _forward_step

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = tiny_model(LLAMA, **recompute).train()
    tokens = some_tokens(LLAMA)
    with ImportanceCollector([model]) as width, BlockInfluenceCollector([model]) as depth:
        logits, _ = _forward_step(iter([tokens]), model)
        logits.sum().backward()
    weights = full_weights(LLAMA)
    assert_same(width.finish(), width_scores(weights, LLAMA, tokens, "l2", "mean"))
    influence, _ = block_scores(weights, LLAMA, tokens, 1)
    torch.testing.assert_close(
        depth.finish()["layers/block_influence"].double(), influence, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "index", "place"),
    [
        ("decoder.layers.1.mlp.linear_fc1.weight", 5, "layer 1, input of mlp.linear_fc2"),
        (
            "decoder.layers.2.self_attention.linear_qkv.weight",
            5,
            "layer 2, input of self_attention.linear_proj",
        ),
        ("decoder.layers.1.pre_mlp_layernorm.weight", 0, "layer 1, output of pre_mlp_layernorm"),
        ("decoder.layers.2.mlp.linear_fc2.weight", 0, "output of final_layernorm"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_by_place(name, index, place, value):
    weights = full_weights(LLAMA)
    weights[name][index] = value
    with pytest.raises(InputError, match=f"NaN or infinity in the activations: {place}$"):
        collect(tiny_model(LLAMA, weights=weights), some_tokens(LLAMA))


def test_a_bad_residual_stream_is_named_by_layer():
    weights = full_weights(LLAMA)
    weights["decoder.layers.1.mlp.linear_fc2.weight"][0] = float("nan")
    model = tiny_model(LLAMA, weights=weights)
    with BlockInfluenceCollector([model]) as collector:
        forward_logits(model, some_tokens(LLAMA))
    with pytest.raises(
        InputError, match="residual stream: from the input of layer 1 to the output of layer 1"
    ):
        collector.finish()


@pytest.mark.parametrize("arch", [LLAMA, GPT], ids=["llama", "gpt"])
def test_block_influence_of_layers_and_blocks(arch):
    model, tokens = tiny_model(arch), some_tokens(arch)
    with BlockInfluenceCollector([model], lengths=[3, 1, 2]) as collector:
        forward_logits(model, tokens, 2)
    scores = collector.finish()
    assert len(scores) == 6
    for length in (1, 2, 3):
        expected = block_scores(full_weights(arch), arch, tokens, length)
        for metric, values in zip(("block_influence", "angular_distance"), expected, strict=True):
            name = f"layers/{metric}" if length == 1 else f"blocks/{metric}/{length}"
            torch.testing.assert_close(
                scores[name].double(), values, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_cannot_be_scored_is_refused_by_name():
    model = tiny_model(LLAMA)
    refusals = [
        (
            lambda: ImportanceCollector([model], axes=["num_layers"]),
            r"axes=\['num_layers'\]: must be some of",
        ),
        (lambda: ImportanceCollector([model], axes=[]), "axes"),
        (lambda: ImportanceCollector([model], batch="max"), "batch aggregation='max'"),
        (lambda: ImportanceCollector([torch.nn.Linear(1, 1)]), "Linear: not a Megatron GPT"),
        (lambda: BlockInfluenceCollector([model], [4]), "block length 4: must be between 1 and 3"),
        (lambda: BlockInfluenceCollector([model], []), "block length 0"),
        (lambda: ImportanceCollector([model]).finish(), "at least one sample"),
        (lambda: BlockInfluenceCollector([model]).finish(), "no sample"),
    ]
    for make, message in refusals:
        with pytest.raises(InputError, match=message):
            make()
    model.decoder.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1: its Identity is no dense MLP"):
        ImportanceCollector([model], axes=["ffn_hidden_size"])


def test_state_is_one_or_two_numbers_a_unit():
    """Memory does not grow with the data: that is what lets 1024 sequences of a large model be scored."""
    model = tiny_model(LLAMA)
    sizes = []
    with ImportanceCollector([model], batch="var", sequence="var") as collector:
        for b in (1, 8):
            forward_logits(model, some_tokens(LLAMA, b, 16))
            tracks = collector._tracks[0].values()
            assert not any(track._moments for track in tracks)
            states = [
                t for track in tracks for t in vars(track._batch).values() if isinstance(t, torch.Tensor)
            ]
            sizes.append(sum(t.numel() for t in states))
    assert sizes[0] == sizes[1] == 2 * (3 * 24 + 3 * 8 + 7 * 16)
