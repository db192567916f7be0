"""A pruned model's checkpoint, saved by Megatron, loads into a model built at that size under any layout."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.pruning import PrunePlan, prune
from tests.distributed.test_pruning_layouts import SIZES, SOURCES, random_plan, some_tokens
from tests.support.pruned_by_hand import slice_weights
from tests.support.ranks import layout
from tests.support.reference import Reference, forward_logits, full_weights, tiny_model

Run = Callable[..., list[Any]]


@pytest.mark.parametrize("fused_norms", [False, True], ids=["local", "fused"])
@pytest.mark.parametrize(
    "saved_at",
    [{"tp": 2, "pp": 2}, *(pytest.param(at, marks=pytest.mark.slow) for at in ({"tp": 4}, {"pp": 4}, {}))],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_checkpoints_load_under_other_layouts(
    family: str, saved_at: dict, fused_norms: bool, tmp_path: Path, run_on_ranks: Run
) -> None:
    plan = random_plan(SOURCES[family], SIZES["both"])
    run_on_ranks(4, save_and_load, str(tmp_path), saved_at, plan, fused_norms)


def save_and_load(path: str, saved_at: dict[str, Any], plan: PrunePlan, fused_norms: bool) -> None:
    """On ranks: every load is into a fresh model with other weights."""
    from megatron.core import dist_checkpointing

    # Megatron's writer forks, which Python denies to daemons, as the test's ranks are.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    layout(**saved_at)
    model, tokens = tiny_model(plan.source, fused_norms=fused_norms), some_tokens(plan.source)
    prune([model], plan)
    dist_checkpointing.save(model.sharded_state_dict(), path)
    expected = Reference(slice_weights(full_weights(plan.source), plan), plan.target)(tokens)
    for at in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2, "sp": True}):
        made = layout(**at)
        # The local spec's checkpoints have the fused names, so either spec loads either.
        fresh = tiny_model(plan.target, seed=99, sequence_parallel=made.sp, fused_norms=not fused_norms)
        fresh.load_state_dict(dist_checkpointing.load(fresh.sharded_state_dict(), path))
        logits = forward_logits(fresh, tokens)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
