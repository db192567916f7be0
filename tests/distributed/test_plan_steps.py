"""Pruning step by step, sharded, ends where the composed plan gets in one go."""

from typing import Any

import pytest
import torch

from nemo_minitron.pruning import PrunePlan, compose, make_plan, prune, step_targets
from tests.distributed.test_pruning_layouts import SOURCES, check_pruned, some_tokens
from tests.support.ranks import layout
from tests.support.reference import forward_logits, tiny_model

SIZES = {
    "hidden_size": 24,
    "ffn_hidden_size": 24,
    "num_query_groups": 4,
    "num_attention_heads": 4,
    "num_layers": 4,
}


def the_plans(family: str) -> list[PrunePlan]:
    plans, before = [], SOURCES[family]
    for seed, after in enumerate(step_targets(before, before.replace(**SIZES), 2)):
        plans.append(make_plan(before, after, importance="random", seed=seed, source_sha256=""))
        before = after
    return plans


def check_steps(at: dict[str, Any], plans: list[PrunePlan]) -> None:
    check_pruned(at, compose(plans))  # against weights cut by hand
    made = layout(**at)
    by_steps, at_once = (tiny_model(plans[0].source, sequence_parallel=made.sp) for _ in range(2))
    for plan in plans:
        prune([by_steps], plan)
    prune([at_once], compose(plans))
    tokens = some_tokens(plans[0].source)
    assert torch.equal(forward_logits(by_steps, tokens), forward_logits(at_once, tokens))
    for one, other in zip(by_steps.parameters(), at_once.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("at", [{"tp": 2, "sp": True}, {"pp": 2}], ids=["tp2-sp", "pp2"])
def test_steps_end_where_one_plan_does(run_on_ranks: Any, at: dict[str, Any], family: str) -> None:
    run_on_ranks(2, check_steps, at, the_plans(family))
