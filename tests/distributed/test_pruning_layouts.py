"""Pruning while sharded gives what a single process gets by slicing full weights, under every layout."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import Kept, PrunePlan, make_plan, prune, resolve_target
from tests.support.pruned_by_hand import slice_weights
from tests.support.pruning_models import FAMILIES, LiveBytes
from tests.support.pruning_strategies import architectures, kept_sets
from tests.support.ranks import layout
from tests.support.reference import (
    Reference,
    forward_logits,
    full_state_dict,
    full_weights,
    local_names,
    tiny_model,
)

WIDE = {"num_layers": 8, "num_attention_heads": 16, "num_query_groups": 8}
SOURCES = {
    "llama": FAMILIES["llama"].replace(**WIDE),
    "qwen2": FAMILIES["qwen2"].replace(**WIDE),
    "gpt": FAMILIES["gpt"].replace(num_layers=8, num_attention_heads=8, num_query_groups=8),
}
WIDTH = {"hidden_size": 24, "ffn_hidden_size": 20, "num_query_groups": 4, "num_attention_heads": 4}
SIZES = {"width": WIDTH, "depth": {"num_layers": 4}, "both": {**WIDTH, "num_layers": 4}}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"pp": 2}),
    (4, {"tp": 4, "sp": True}),
    (4, {"pp": 4}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"tp": 2, "pp": 2, "sp": True}),
    (4, {"tp": 2}),  # and two data-parallel replicas
]
each_layout = pytest.mark.parametrize(
    ("world_size", "at"),
    LAYOUTS,
    ids=[f"{n}-" + "-".join(f"{k}{v:d}" for k, v in at.items()) for n, at in LAYOUTS],
)
# The fast tests have every layout with every axis, and every family with both; the rest of the product is slow.
CASES = [
    pytest.param(family, what, marks=[] if family == "llama" or what == "both" else pytest.mark.slow)
    for family in SOURCES
    for what in SIZES
]
Run = Callable[..., list[Any]]


def random_plan(source: Architecture, sizes: dict[str, Any], **options: Any) -> PrunePlan:
    target = resolve_target(source, sizes)
    return make_plan(source, target, importance="random", seed=3, source_sha256="", **options)


def skewed_plan(source: Architecture, ranks: int, last: bool = False) -> PrunePlan:
    """All that stays is on the first (or last) rank: the other ranks get all of their new units from there."""
    ffn, groups = source.ffn_hidden_size // ranks, source.num_query_groups // ranks
    first_unit, first_group = ((ranks - 1) * ffn, (ranks - 1) * groups) if last else (0, 0)
    kept_groups = list(range(first_group, first_group + groups))
    heads = [g * source.heads_per_group + h for g in kept_groups for h in range(source.heads_per_group)]
    sizes = {"ffn_hidden_size": ffn, "num_query_groups": groups, "num_attention_heads": len(heads)}
    kept = Kept(
        ffn_hidden_size=[list(range(first_unit, first_unit + ffn))] * source.num_layers,
        num_query_groups=[kept_groups] * source.num_layers,
        num_attention_heads=[heads] * source.num_layers,
    )
    return PrunePlan("", source, source.replace(**sizes), {}, kept)


def some_tokens(arch: Architecture) -> Tensor:
    return torch.randint(arch.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))


def check_pruned(at: dict[str, Any], plan: PrunePlan, options: dict[str, Any] | None = None) -> None:
    """On ranks: weights to the bit, logits to 1e-4."""
    made = layout(**at)
    model = tiny_model(plan.source, sequence_parallel=made.sp, **(options or {}))
    prune([model], plan)
    expected = slice_weights(full_weights(plan.source), plan)
    found = local_names(full_state_dict(model))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    tokens = some_tokens(plan.source)
    logits = forward_logits(model, tokens)
    torch.testing.assert_close(logits, Reference(expected, plan.target)(tokens), atol=1e-4, rtol=1e-4)


@each_layout
@pytest.mark.parametrize(("family", "what"), CASES)
def test_pruned_as_by_hand(family: str, what: str, world_size: int, at: dict, run_on_ranks: Run) -> None:
    run_on_ranks(world_size, check_pruned, at, random_plan(SOURCES[family], SIZES[what]))


@pytest.mark.parametrize("at", [{"tp": 4}, {"tp": 2, "pp": 2}])
def test_fused_norms(at: dict, run_on_ranks: Run) -> None:
    plan = random_plan(SOURCES["llama"], SIZES["both"])
    run_on_ranks(4, check_pruned, at, plan, {"fused_norms": True})


@pytest.mark.parametrize("last", [False, True])
def test_units_that_all_sit_on_one_rank(last: bool, run_on_ranks: Run) -> None:
    source = SOURCES["llama"].replace(num_query_groups=16)
    run_on_ranks(4, check_pruned, {"tp": 4}, skewed_plan(source, 4, last))


@pytest.mark.parametrize(
    "kept",
    [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 7], [0, 5, 6, 7]],
    ids=lambda kept: "".join(map(str, kept)),
)
def test_layers_move_whichever_way_they_have_to(kept: list[int], run_on_ranks: Run) -> None:
    plan = random_plan(SOURCES["gpt"], {"num_layers": 4}, keep_layers=kept)
    run_on_ranks(4, check_pruned, {"pp": 4}, plan)


@pytest.mark.parametrize("what", ["width", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers_in_first_pipeline_stage": 6},
        {"num_layers_in_last_pipeline_stage": 5},
    ],
)
def test_uneven_stages(options: dict, what: str, run_on_ranks: Run) -> None:
    run_on_ranks(2, check_pruned, {"pp": 2}, random_plan(SOURCES["llama"], SIZES[what]), options)


@pytest.mark.parametrize("at", [{"tp": 2, "sp": True}, {"pp": 2}], ids=str)
def test_bfloat16(at: dict, run_on_ranks: Run) -> None:
    source = SOURCES["llama"].replace(num_query_groups=16)
    plans = [
        skewed_plan(source, 2),
        random_plan(source, {"num_layers": 2, "hidden_size": 20}, keep_layers=[0, 1]),
    ]
    run_on_ranks(2, check_bfloat16, at, plans)


def check_bfloat16(at: dict[str, Any], plans: list[PrunePlan]) -> None:
    made = layout(**at)
    for plan in plans:
        model = tiny_model(plan.source, sequence_parallel=made.sp, dtype=torch.bfloat16)
        prune([model], plan)
        expected = slice_weights(full_weights(plan.source, dtype=torch.bfloat16), plan)
        found = full_state_dict(model)
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_parameters_are_marked_as_in_a_model_built_at_that_size(run_on_ranks: Run) -> None:
    plan = random_plan(SOURCES["gpt"], SIZES["both"], keep_layers=[4, 5, 6, 7])
    run_on_ranks(4, check_marks, plan)


def check_marks(plan: PrunePlan) -> None:
    """Gradients are summed and norms counted by these marks; they travel with a layer to another stage."""
    layout(tp=2, pp=2)
    options = {"sequence_parallel": True, "perform_initialization": True}
    model, built = tiny_model(plan.source, **options), tiny_model(plan.target, **options)
    prune([model], plan)
    expected = {name: (p.shape, p.requires_grad, vars(p)) for name, p in built.named_parameters()}
    assert {name: (p.shape, p.requires_grad, vars(p)) for name, p in model.named_parameters()} == expected
    assert any(p.sequence_parallel for p in built.parameters() if hasattr(p, "sequence_parallel"))


def test_head_residual(run_on_ranks: Run) -> None:
    run_on_ranks(2, check_head_residual)


def check_head_residual() -> None:
    """The pairs' query rows, written out; the reference slices what they give."""
    layout(tp=2)
    source = SOURCES["llama"].replace(num_attention_heads=24)
    plan = random_plan(source, {"num_attention_heads": 16}, head_residual=True)
    model, tokens = tiny_model(source), some_tokens(source)
    prune([model], plan)
    weights = full_weights(source)
    assert plan.head_residual is not None
    for layer, pairs in enumerate(plan.head_residual):
        assert len(pairs) == 8
        qkv = weights[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].view(8, 5, 8, 32)
        for kept, pruned in pairs:
            qkv[kept // 3, kept % 3] = 2 * qkv[kept // 3, kept % 3] - qkv[pruned // 3, pruned % 3]
    expected = Reference(slice_weights(weights, plan), plan.target)(tokens)
    torch.testing.assert_close(forward_logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


def test_virtual_stages(run_on_ranks: Run) -> None:
    run_on_ranks(2, check_virtual_stages)


def check_virtual_stages() -> None:
    """Two chunks a rank, interleaved: the layers end up where Megatron looks for them, with their weights."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.support.reference import load_full, model_config

    layout(pp=2)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    plan = random_plan(SOURCES["llama"], SIZES["both"])
    config = model_config(plan.source, virtual_pipeline_model_parallel_size=2)
    chunks = [
        GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            plan.source.vocab_size,
            64,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="rope",
            vp_stage=stage,
        )
        for stage in range(2)
    ]
    for chunk in chunks:
        load_full(chunk, full_weights(plan.source))
    prune(chunks, plan)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    numbers = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
    assert numbers == [[rank + 1], [rank + 3]]
    found = full_state_dict(chunks[0]) | full_state_dict(chunks[1])
    expected = slice_weights(full_weights(plan.source), plan)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "sizes", "message"),
    [
        (
            {"tp": 4},
            {"ffn_hidden_size": 18},
            "ffn_hidden_size=18: not divisible by tensor_model_parallel_size=4",
        ),
        ({"tp": 4}, {"num_query_groups": 2}, "num_query_groups=2: leaves 2 of 4 tensor-parallel ranks empty"),
        ({"pp": 4}, {"num_layers": 6}, "num_layers=6: not divisible by the stages"),
        ({"pp": 4}, {"num_layers": 3}, "num_layers=3: leaves 1 of 4 stages empty"),
    ],
)
def test_targets_that_the_layout_cannot_hold(at: dict, sizes: dict, message: str, run_on_ranks: Run) -> None:
    with pytest.raises(InputError, match=message):
        run_on_ranks(4, check_pruned, at, random_plan(SOURCES["llama"], sizes))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), at=st.sampled_from([at for world_size, at in LAYOUTS if world_size == 4]))
def test_any_plan_is_refused_or_gives_the_sliced_model(
    data: st.DataObject, at: dict, run_on_ranks: Run
) -> None:
    tp, pp = at.get("tp", 1), at.get("pp", 1)
    source = data.draw(architectures(tp, pp))
    sizes, kept = data.draw(kept_sets(source))
    plan = PrunePlan("", source, source.replace(**sizes), {}, kept)
    fits = not (sizes["ffn_hidden_size"] % tp or sizes["num_query_groups"] % tp)
    # Nothing but a changed number of layers makes stages anew.
    fits &= sizes["num_layers"] == source.num_layers or sizes["num_layers"] % pp == 0
    if fits:
        run_on_ranks(4, check_pruned, at, plan, {"fused_norms": data.draw(st.booleans())})
    else:
        with pytest.raises(InputError, match="divisible|leaves"):
            run_on_ranks(4, check_pruned, at, plan)


# ---- what it costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [{"tp": 4}, {"tp": 2, "pp": 2}, {"pp": 4}], ids=str)
@pytest.mark.parametrize("what", ["first", "last", "even", "layers-left", "layers-right"])
def test_memory_stays_below_one_layer_beyond_the_model(what: str, at: dict, run_on_ranks: Run) -> None:
    # With four layers a stage, a stage that took layers in before it gave its own away would hold two too many.
    source = Architecture(16, 96, 256, 16, 16, 8, 64)
    plans = {
        "first": skewed_plan(source, at.get("tp", 1)),
        "last": skewed_plan(source, at.get("tp", 1), last=True),
        "even": random_plan(source, {"hidden_size": 90, "ffn_hidden_size": 244}),
        "layers-left": random_plan(source, {"num_layers": 8, "hidden_size": 92}, keep_layers=[*range(8, 16)]),
        "layers-right": random_plan(source, {"num_layers": 8}, keep_layers=[*range(8)]),
    }
    for peak, layer_bytes in run_on_ranks(4, memory_of, at, plans[what]):
        assert peak <= layer_bytes


def memory_of(at: dict[str, Any], plan: PrunePlan) -> tuple[int, int]:
    """On a rank: the peak beyond the model before and after (bytes), and one layer's shard before (bytes)."""
    layout(**at)
    model = tiny_model(plan.source)
    layer_bytes = 4 * sum(p.numel() for p in model.decoder.layers[0].parameters())
    with LiveBytes(model) as live:
        prune([model], plan)
    after = sum(4 * p.numel() for p in model.parameters())
    # On a busy machine gloo's thread may not have let go of what it sent last.
    give_up = time.monotonic() + 10
    while live.now != after and time.monotonic() < give_up:
        time.sleep(0.01)
    assert live.now == after
    return live.peak - max(live.start, live.now), layer_bytes


@pytest.mark.parametrize("last", [False, True])
def test_only_units_that_change_their_rank_are_sent(last: bool, run_on_ranks: Run) -> None:
    source = SOURCES["llama"].replace(num_query_groups=16)
    plan = skewed_plan(source, 2, last)
    sent = run_on_ranks(2, bytes_sent, plan)
    # Half of what stays, with all of its rows: qkv and proj of 4 heads, gate, up and down of 12 neurons.
    moved = 4 * source.num_layers * 32 * (4 * 8 * 4 + 12 * 3)
    assert [sum(calls) for calls in sent] == ([0, moved] if last else [moved, 0])


def test_nothing_is_sent_where_shares_are_even(run_on_ranks: Run) -> None:
    source = SOURCES["llama"]
    even = [[*range(10), *range(24, 34)]] * source.num_layers
    heads = list(range(0, 16, 2))
    kept = Kept(
        hidden_size=list(range(20)), ffn_hidden_size=even, num_attention_heads=[heads] * source.num_layers
    )
    target = source.replace(hidden_size=20, ffn_hidden_size=20, num_attention_heads=8)
    assert run_on_ranks(2, bytes_sent, PrunePlan("", source, target, {}, kept)) == [[], []]


def bytes_sent(plan: PrunePlan) -> list[int]:
    """On a rank: what it hands to others (bytes), exchange by exchange."""
    from nemo_minitron import parallel

    layout(tp=2)
    model, original, sent = tiny_model(plan.source), parallel.exchange_tp, []

    def counting(send: list[Tensor]) -> list[Tensor]:
        sent.append(sum(t.numel() * t.element_size() for t in send))
        return original(send)

    parallel.exchange_tp = counting
    try:
        prune([model], plan)
    finally:
        parallel.exchange_tp = original
    return sent
