"""Pruning on one process: the real Megatron model against plain torch on weights sliced by hand."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import PrunePlan, make_plan, prune, resolve_target, width
from tests.support.pruned_by_hand import slice_weights
from tests.support.pruning_models import FAMILIES, LLAMA, LiveBytes
from tests.support.pruning_strategies import architectures, kept_sets
from tests.support.reference import (
    Reference,
    forward_logits,
    full_state_dict,
    full_weights,
    local_names,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("megatron")

AXES: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": 20},
    "ffn_hidden_size": {"ffn_hidden_size": 30},
    "num_attention_heads": {"num_attention_heads": 0.5},
    "num_query_groups": {"num_query_groups": 3},
    "num_layers": {"num_layers": 3},
}
AXES["all"] = {
    "hidden_size": 24,
    "ffn_hidden_size": 10,
    "num_query_groups": 2,
    "num_attention_heads": 2,
    "num_layers": 2,
}


def random_plan(source: Architecture, sizes: dict[str, Any], seed: int = 0, **options: Any) -> PrunePlan:
    target = resolve_target(source, sizes)
    return make_plan(source, target, importance="random", seed=seed, source_sha256="", **options)


def some_tokens(arch: Architecture) -> Tensor:
    return torch.randint(arch.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def assert_prunes(plan: PrunePlan, *, fused_norms: bool = False, seed: int = 0) -> None:
    model, tokens = tiny_model(plan.source, seed, fused_norms=fused_norms), some_tokens(plan.source)
    prune([model], plan)
    sliced = slice_weights(full_weights(plan.source, seed), plan)
    expected = Reference(sliced, plan.target)(tokens)
    torch.testing.assert_close(forward_logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused_norms", [False, True], ids=["local", "fused"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_logits_are_those_of_sliced_weights(family: str, axis: str, fused_norms: bool) -> None:
    assert_prunes(random_plan(FAMILIES[family], AXES[axis]), fused_norms=fused_norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_sliced_one_to_the_bit(family: str, dtype: torch.dtype) -> None:
    plan = random_plan(FAMILIES[family], AXES["all"], seed=2)
    model = tiny_model(plan.source, dtype=dtype)
    prune([model], plan)
    expected = slice_weights(full_weights(plan.source, dtype=dtype), plan)
    found = local_names(full_state_dict(model))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name


def plain_attributes(model: Any) -> dict[str, Any]:
    """Every number, flag, size and string that a module of the model or its config holds."""
    found = {}
    for name, module in model.named_modules():
        owners = {"": vars(module)}
        if hasattr(module, "config"):
            owners["config."] = vars(module.config)
        for prefix, values in owners.items():
            for key, value in values.items():
                if isinstance(value, int | float | str | tuple | list | torch.Size):
                    found[f"{name}.{prefix}{key}"] = value
    return found


@pytest.mark.parametrize("fused_norms", [False, True], ids=["local", "fused"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_a_pruned_model_is_as_one_built_at_that_size(family: str, fused_norms: bool) -> None:
    """Cached sizes, configs, layer numbers, the marks of parameters: all that Megatron itself would set."""
    plan = random_plan(FAMILIES[family], AXES["all"])
    model = tiny_model(plan.source, fused_norms=fused_norms, perform_initialization=True)
    built = tiny_model(plan.target, fused_norms=fused_norms, perform_initialization=True)
    prune([model], plan)
    assert plain_attributes(model) == plain_attributes(built)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in built.named_modules()]
    expected = {name: (p.shape, p.dtype, p.requires_grad, vars(p)) for name, p in built.named_parameters()}
    found = {name: (p.shape, p.dtype, p.requires_grad, vars(p)) for name, p in model.named_parameters()}
    assert found == expected
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_pruned_model_trains() -> None:
    plan = random_plan(LLAMA, AXES["all"])
    model = tiny_model(LLAMA)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "linear_qkv" not in name
        parameter.main_grad = torch.zeros_like(parameter)
    prune([model], plan)
    assert model.decoder.layers[1].training
    s = some_tokens(LLAMA).shape[1]
    future = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    positions = torch.arange(s).expand(2, s)
    model(some_tokens(LLAMA), positions, future, labels=some_tokens(LLAMA)).sum().backward()
    for name, parameter in model.named_parameters():
        assert not hasattr(parameter, "main_grad")
        if "linear_qkv" in name:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert float(parameter.grad.abs().sum()) > 0


def test_what_is_left_alone_is_not_copied() -> None:
    model = tiny_model(LLAMA)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    prune([model], random_plan(LLAMA, {"ffn_hidden_size": 8}))
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name.split(".")[-2] for name in before if before[name] != after[name]} == {
        "linear_fc1",
        "linear_fc2",
    }


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_cut_in_chunks(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 4 rows, the last one shorter, and more of them than threads."""
    monkeypatch.setattr(width, "_COPIED_ELEMENTS", 4 * 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    values = torch.randn(50, 40).to(dtype)
    kept = {"hidden": torch.arange(0, 40, 3), "ffn": torch.tensor([*range(7), *range(20, 50)])}
    chosen = {axis: width.Selection((indices,)) for axis, indices in kept.items()}
    for axes, expected in {
        ("ffn", "hidden"): values[kept["ffn"]][:, kept["hidden"]],
        (None, "hidden"): values[:, kept["hidden"]],
        ("ffn", None): values[kept["ffn"]],
    }.items():
        found = width.cut(torch.nn.Parameter(values.clone()), axes, chosen)
        assert torch.equal(found, expected)


def test_layers_carry_their_own_settings_along() -> None:
    plan = random_plan(LLAMA, {"num_layers": 2}, keep_layers=[1, 3])
    model = tiny_model(LLAMA, no_rope_freq=[0, 1, 0, 1], account_for_loss_in_pipeline_split=False)
    prune([model], plan)
    config = model.config
    assert config.no_rope_freq == [1, 1]
    assert (config.num_layers, [layer.layer_number for layer in model.decoder.layers]) == (2, [1, 2])
    assert config.pipeline_model_parallel_layout is None


def test_copied_configs_are_updated_too() -> None:
    plan = random_plan(LLAMA, AXES["all"])
    model = tiny_model(LLAMA)
    model.embedding.config = copy.copy(model.config)
    prune([model], plan)
    for config in (model.config, model.decoder.config, model.embedding.config):
        assert (config.hidden_size, config.num_layers, config.kv_channels) == (24, 2, 8)


def test_wrappers_are_looked_through() -> None:
    plan = random_plan(LLAMA, {"hidden_size": 20})
    model = tiny_model(LLAMA)
    wrapper = torch.nn.Module()
    wrapper.module = model
    prune([wrapper], plan)
    assert model.embedding.word_embeddings.weight.shape == (64, 20)


# ---- head residual -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, 8])
def test_head_residual_adds_what_the_pruned_heads_did(heads: int) -> None:
    source = LLAMA.replace(num_attention_heads=12, add_qkv_bias=True)
    plan = random_plan(source, {"num_attention_heads": heads, "hidden_size": 24}, head_residual=True)
    model, tokens = tiny_model(source), some_tokens(source)
    prune([model], plan)
    assert plan.head_residual is not None
    weights = full_weights(source)
    for layer, pairs in enumerate(plan.head_residual):
        assert len(pairs) == 4  # One for each group: min(K, L - K) with L = 3.
        for kind in ("weight", "bias"):
            qkv = weights[f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}"]
            original = qkv.clone()
            for kept, pruned in pairs:
                # Rows of a query head: 5 blocks of 8 rows a group (three heads, key, value).
                a, b = (((h // 3) * 5 + h % 3) * 8 for h in (kept, pruned))
                qkv[a : a + 8] = original[a : a + 8] + (original[a : a + 8] - original[b : b + 8])
    expected = Reference(slice_weights(weights, plan), plan.target)(tokens)
    torch.testing.assert_close(forward_logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


# ---- refusals ----------------------------------------------------------------------------------------------


def assert_untouched(model: Any, weights: dict[str, Tensor]) -> None:
    found = local_names(full_state_dict(model))
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_plan_for_another_model_is_refused() -> None:
    plan = random_plan(LLAMA.replace(ffn_hidden_size=64), {"hidden_size": 16})
    model = tiny_model(LLAMA)
    with pytest.raises(InputError, match="ffn_hidden_size=48: the plan is for a model with 64"):
        prune([model], plan)
    assert_untouched(model, full_weights(LLAMA))


def test_parameters_that_pruning_does_not_know_are_refused() -> None:
    model = tiny_model(LLAMA)
    model.decoder.layers[2].mlp.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(
        InputError, match=r"parameter decoder.layers.2.mlp.adapter.weight: pruning does not know"
    ):
        prune([model], random_plan(LLAMA, {"hidden_size": 16}))


def test_models_already_in_gradient_buffers_are_refused() -> None:
    wrapper = torch.nn.Module()
    wrapper.module = tiny_model(LLAMA)
    wrapper.ddp_config = object()
    with pytest.raises(AssertionError, match="before the model is wrapped"):
        prune([wrapper], random_plan(LLAMA, {"hidden_size": 16}))


# ---- properties --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), fused_norms=st.booleans())
def test_any_kept_set_gives_the_sliced_model(data: st.DataObject, fused_norms: bool) -> None:
    source = data.draw(architectures())
    sizes, kept = data.draw(kept_sets(source))
    plan = PrunePlan("", source, source.replace(**sizes), {}, kept)
    assert_prunes(plan, fused_norms=fused_norms, seed=data.draw(st.integers(0, 99)))


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_memory_stays_below_one_layer_beyond_the_model(share: float) -> None:
    source = LLAMA.replace(hidden_size=256, ffn_hidden_size=672, kv_channels=32, num_layers=6)
    sizes = {"hidden_size": int(256 * share) - 1, "ffn_hidden_size": int(672 * share) - 1}
    plan = random_plan(source, sizes)
    model = tiny_model(source)
    with LiveBytes(model) as live:
        prune([model], plan)
    layer_bytes = 4 * source.layer_parameters()
    assert live.start == sum(4 * p.numel() for p in tiny_model(source).parameters())
    assert live.peak - live.start <= layer_bytes
    assert live.now == sum(4 * p.numel() for p in model.parameters())
