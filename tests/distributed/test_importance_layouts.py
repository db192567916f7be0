"""The same scores under every parallel layout: those of the papers' formulas on the reference's
activations."""

import itertools

import pytest
import torch

from nemo_minitron import parallel
from nemo_minitron.arch import Architecture
from nemo_minitron.axes import WIDTH_AXES
from nemo_minitron.errors import InputError
from nemo_minitron.importance import BlockInfluenceCollector, ImportanceCollector
from nemo_minitron.importance.aggregation import STATISTICS
from tests.support.expected_scores import block_scores, width_scores
from tests.support.ranks import layout
from tests.support.reference import forward_logits, full_weights, tiny_model

LLAMA = Architecture(4, 16, 24, 8, 4, 6, vocab_size=32)
GPT = LLAMA.replace(
    num_query_groups=8,
    gated_linear_unit=False,
    normalization="LayerNorm",
    add_bias_linear=True,
    position_embedding_type="learned_absolute",
    max_position_embeddings=16,
    activation="gelu",
)
FIRST_HAS_1 = {"num_layers_in_first_pipeline_stage": 1}
LAYOUTS = {
    "tp2": (2, {"tp": 2}, {}),
    "tp2-sp": (2, {"tp": 2, "sp": True}, {}),
    "tp2-sp-fused": (2, {"tp": 2, "sp": True}, {"fused_norms": True}),
    "pp2-uneven": (2, {"pp": 2}, FIRST_HAS_1),
    "dp2": (2, {}, {}),
    "tp2-pp2-sp": (4, {"tp": 2, "pp": 2, "sp": True}, {}),
    "tp2-dp2": (4, {"tp": 2}, {}),
    "pp2-dp2-fused": (4, {"pp": 2}, {"fused_norms": True, **FIRST_HAS_1}),
}


def the_tokens(arch: Architecture) -> torch.Tensor:
    return torch.randint(arch.vocab_size, (5, 8), generator=torch.Generator().manual_seed(3))


def own_samples(tokens: torch.Tensor) -> torch.Tensor:
    """Data-parallel rank 0 scores 3 of the 5 samples, rank 1 the other 2."""
    return tokens.tensor_split(parallel.dp_size())[parallel.dp_rank()]


def score(
    arch: Architecture, sizes: dict, options: dict, aggregations: list
) -> list[dict[str, torch.Tensor]]:
    at = layout(**sizes)
    model = tiny_model(arch, sequence_parallel=at.sp, **options)
    tokens, results = own_samples(the_tokens(arch)), []
    # Stages agree on one size of microbatch beforehand; without them the last may be smaller.
    micro_batch_size = 2 if at.pp == 1 else 1
    for batch, sequence in aggregations:
        with ImportanceCollector([model], batch=batch, sequence=sequence) as collector:
            forward_logits(model, tokens, micro_batch_size)
        results.append(collector.finish())
        assert (collector.samples, collector.tokens) == (5, 40)
    return results


@pytest.mark.parametrize(("world_size", "sizes", "options"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("arch", [LLAMA, GPT], ids=["llama", "gpt"])
def test_width_scores_do_not_depend_on_the_layout(run_on_ranks, arch, world_size, sizes, options):
    aggregations = list(itertools.product(STATISTICS, STATISTICS))
    by_rank = run_on_ranks(world_size, score, arch, sizes, options, aggregations)
    for number, (batch, sequence) in enumerate(aggregations):
        expected = width_scores(full_weights(arch), arch, the_tokens(arch), batch, sequence)
        for rank, results in enumerate(by_rank):
            assert list(results[number]) == list(WIDTH_AXES)
            for axis, scores in results[number].items():
                # Variances of float32 activations carry their rounding twice.
                rtol = 5e-5 if "var" in (batch, sequence) else 1e-5
                atol = rtol * float(expected[axis].mean())
                what = f"{axis} by ({batch}, {sequence}) on rank {rank}"
                torch.testing.assert_close(
                    scores.double(), expected[axis], rtol=rtol, atol=atol, msg=lambda m, w=what: f"{w}: {m}"
                )
                assert torch.equal(scores, by_rank[0][number][axis]), f"{what} is not rank 0's"


def influence(arch: Architecture, sizes: dict, options: dict, lengths: list[int]) -> dict[str, torch.Tensor]:
    at = layout(**sizes)
    model = tiny_model(arch, sequence_parallel=at.sp, **options)
    with BlockInfluenceCollector([model], lengths) as collector:
        forward_logits(model, own_samples(the_tokens(arch)), 1)
    return collector.finish()


@pytest.mark.parametrize(
    ("world_size", "sizes", "options"),
    [
        LAYOUTS["tp2-sp"],
        LAYOUTS["pp2-uneven"],
        LAYOUTS["pp2-dp2-fused"],
        LAYOUTS["tp2-pp2-sp"],
        (4, {"pp": 4}, {}),
    ],
    ids=["tp2-sp", "pp2-uneven", "pp2-dp2", "tp2-pp2-sp", "pp4"],
)
def test_blocks_reach_across_stages(run_on_ranks, world_size, sizes, options):
    lengths = [1, 2, 3, 4]
    for scores in run_on_ranks(world_size, influence, LLAMA, sizes, options, lengths):
        for length in lengths:
            expected = block_scores(full_weights(LLAMA), LLAMA, the_tokens(LLAMA), length)
            for metric, values in zip(("block_influence", "angular_distance"), expected, strict=True):
                name = f"layers/{metric}" if length == 1 else f"blocks/{metric}/{length}"
                torch.testing.assert_close(scores[name].double(), values, rtol=1e-5, atol=1e-6)


def score_broken(sizes: dict, name: str, index: int) -> None:
    at = layout(**sizes)
    weights = full_weights(LLAMA)
    weights[name][index] = float("nan")
    model = tiny_model(LLAMA, weights=weights, sequence_parallel=at.sp)
    score_it = ImportanceCollector([model])
    with score_it:
        forward_logits(model, own_samples(the_tokens(LLAMA)))
    score_it.finish()


@pytest.mark.parametrize(
    ("sizes", "name", "index", "place"),
    [
        # The second rank's unit of the last layer: the first rank's own activations are all finite.
        ({"tp": 2}, "decoder.layers.3.mlp.linear_fc1.weight", 23, "layer 3, input of mlp.linear_fc2"),
        ({"pp": 2}, "decoder.layers.1.mlp.linear_fc1.weight", 5, "layer 1, input of mlp.linear_fc2"),
    ],
    ids=["tp2", "pp2"],
)
def test_every_rank_names_the_same_place(run_on_ranks, sizes, name, index, place):
    with pytest.raises(InputError, match=f"NaN or infinity in the activations: {place}$"):
        run_on_ranks(2, score_broken, sizes, name, index)
    # Had one rank gone on alone, it would now hang in a collective and the ranks would have been killed.
    assert run_on_ranks(2, parallel.tp_rank, timeout=20) == [0, 0]


def one_rank_has_no_samples() -> None:
    layout()
    model = tiny_model(LLAMA)
    with ImportanceCollector([model]) as collector:
        if parallel.dp_rank() == 0:
            forward_logits(model, the_tokens(LLAMA))
    collector.finish()


def test_a_data_parallel_rank_without_samples_is_refused(run_on_ranks):
    with pytest.raises(InputError, match="every data-parallel rank needs at least one sample"):
        run_on_ranks(2, one_rank_has_no_samples)
