"""Every family's scores and pruned logits on two ranks, in float32 and bfloat16, against plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.importance import ImportanceCollector
from nemo_minitron.pruning import PrunePlan, make_plan, prune, resolve_target
from tests.support.expected_scores import width_scores
from tests.support.pruned_by_hand import slice_weights
from tests.support.pruning_models import FAMILIES
from tests.support.ranks import layout
from tests.support.reference import Reference, forward_logits, full_weights, tiny_model

SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_query_groups": 2,
    "num_attention_heads": 2,
}
LAYOUTS = {"one": (1, {}), "tp2-sp": (2, {"tp": 2, "sp": True}), "pp2": (2, {"pp": 2})}


def some_tokens(arch: Architecture) -> Tensor:
    return torch.randint(arch.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))


def scored_and_pruned(plan: PrunePlan, sizes: dict[str, Any], dtype: torch.dtype) -> Any:
    """On ranks: the scores of the model and the logits once it is pruned."""
    at, tokens = layout(**sizes), some_tokens(plan.source)
    weights = full_weights(plan.source, dtype=dtype)
    model = tiny_model(plan.source, weights=weights, sequence_parallel=at.sp, dtype=dtype)
    with ImportanceCollector([model]) as collector:
        forward_logits(model, tokens)
    scores = collector.finish()
    prune([model], plan)
    return scores, forward_logits(model, tokens).float()


def both_dtypes(plan: PrunePlan, sizes: dict[str, Any]) -> list[Any]:
    return [scored_and_pruned(plan, sizes, dtype) for dtype in (torch.float32, torch.bfloat16)]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of the whole."""
    return float((found.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_pruned_logits(run_on_ranks: Any, family: str, world_size: int, sizes: dict) -> None:
    source = FAMILIES[family]
    target = resolve_target(source, SIZES)
    plan = make_plan(source, target, importance="random", seed=5, source_sha256="")
    for by_dtype in run_on_ranks(world_size, both_dtypes, plan, sizes):
        # The reference calculates in float32, also with weights that were rounded to bfloat16; its eps of 2^-8
        # adds up over a few layers.
        for (scores, logits), dtype, bound in zip(
            by_dtype, (torch.float32, torch.bfloat16), (1e-5, 3e-2), strict=True
        ):
            weights = {k: w.float() for k, w in full_weights(source, dtype=dtype).items()}
            tokens = some_tokens(source)
            for axis, expected in width_scores(weights, source, tokens, "l2", "mean").items():
                assert distance(scores[axis], expected) < bound, f"{axis}, {dtype}"
            expected = Reference(slice_weights(weights, plan), target)(tokens)
            assert distance(logits, expected) < bound, f"logits, {dtype}"
            if dtype == torch.float32:
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
