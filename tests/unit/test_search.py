"""Candidates inside a budget, against counting by hand; Optuna's order; what is refused."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_minitron.arch import Architecture
from nemo_minitron.config.recipes import SearchRecipe
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.errors import InputError
from nemo_minitron.search.candidates import (
    Candidate,
    Workload,
    candidates,
    check_grid,
    make_budget,
    search_optuna,
)
from nemo_minitron.workflows.search.trials import Trials

SOURCE = Architecture(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=512,
)
LOAD = Workload(context=100, sequences=3, bytes_per_value=2)
GRID = {"hidden_size": [64, 48, 32], "ffn_hidden_size": [128, 96, 64], "num_layers": [4, 3, 2]}


def weights(hidden: int, ffn: int, layers: int) -> int:
    """Llama's matrices and norms, written out."""
    attention = hidden * 8 * 8 + 2 * hidden * 4 * 8 + 8 * 8 * hidden
    return 2 * 512 * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden


def test_the_candidates_are_the_grid_points_inside_fullest_first() -> None:
    limit = weights(48, 96, 3)
    found = candidates(SOURCE, GRID, make_budget(SOURCE, {"parameters": limit}, 0.2, LOAD), LOAD)
    sizes = [
        (c.architecture.hidden_size, c.architecture.ffn_hidden_size, c.architecture.num_layers) for c in found
    ]
    inside = [p for p in itertools.product(*GRID.values()) if 0.8 * limit <= weights(*p) <= limit]
    assert sorted(sizes) == sorted(inside)
    assert len(inside) > 2
    counts = [c.costs["parameters"] for c in found]
    assert counts == sorted((weights(*p) for p in inside), reverse=True)


def test_memory_is_weights_and_keys_and_values() -> None:
    cache = 2 * 4 * (4 * 8) * 100 * 3
    assert LOAD.costs(SOURCE)["memory_bytes"] == 2 * (weights(64, 128, 4) + cache)


def test_a_fraction_of_the_source_is_a_limit() -> None:
    budget = make_budget(SOURCE, {"parameters": "1/2", "flops_per_token": None}, 0.1, LOAD)
    assert dict(budget.limits) == {"parameters": weights(64, 128, 4) / 2}
    assert make_budget(SOURCE, {"parameters": 0.5}, 0.1, LOAD) == budget


def test_sizes_that_the_layout_cannot_hold_are_no_candidates() -> None:
    grid = check_grid({"num_query_groups": [3, 2], "num_layers": None})
    budget = make_budget(SOURCE, {"parameters": "1/1"}, 1.0, LOAD)
    assert [c.architecture.num_query_groups for c in candidates(SOURCE, grid, budget, LOAD, tp=2)] == [2]


def test_optuna_asks_for_the_same_candidates_again_and_for_none_twice() -> None:
    found = candidates(SOURCE, GRID, make_budget(SOURCE, {"parameters": "9/10"}, 0.6, LOAD), LOAD)

    def search() -> list[str]:
        asked: list[str] = []

        def loss(candidate: Candidate) -> float:
            asked.append(candidate.name)
            return 1e6 / candidate.costs["parameters"]

        losses = search_optuna(SOURCE, GRID, found, loss, 5, seed=7)
        assert set(losses) == set(asked)
        return asked

    asked = search()
    assert len(asked) == len(set(asked)) == 5
    assert search() == asked
    assert set(asked) <= {c.name for c in found}


@pytest.mark.parametrize(
    ("grid", "budget", "slack", "said"),
    [
        ({"hidden_sizes": [1]}, {"parameters": 1}, 0.1, "search.grid.hidden_sizes"),
        ({"hidden_size": 48}, {"parameters": 1}, 0.1, "search.grid.hidden_size=48"),
        ({}, {"parameters": 1}, 0.1, "search.grid: give sizes"),
        (GRID, {"parameters": "x/2"}, 0.1, "search.budget.parameters=x/2"),
        (GRID, {"parameter": 5}, 0.1, "search.budget.parameter: unknown"),
        (GRID, {}, 0.1, "search.budget: set one of"),
        (GRID, {"parameters": 5}, 0.0, "search.slack=0.0"),
        (GRID, {"parameters": 5}, 0.1, "no candidate is inside; the nearest: l2-h32-f64"),
        ({"num_attention_heads": [6]}, {"parameters": "1/1"}, 0.1, "no combination is legal"),
    ],
)
def test_what_is_refused(grid: dict[str, Any], budget: dict[str, Any], slack: float, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("[", r"\[").replace(".", r"\.")):
        candidates(SOURCE, check_grid(grid), make_budget(SOURCE, budget, slack, LOAD), LOAD)


def test_a_remembered_loss_is_of_the_dtype_that_it_was_measured_in() -> None:
    """Right after pruning nothing is rounded; after the short distillation the student is."""
    recipe = SearchRecipe(run_dir="run", source="source")
    recipe.distill.max_steps = recipe.distill.global_batch_size = 1
    trials: Any = object.__new__(Trials)
    indexed = SimpleNamespace(manifest_sha256="y")
    trials.prepared = SimpleNamespace(source_sha256="x", data=SimpleNamespace(indexed=indexed))
    found = []
    for dtype in (None, "bfloat16"):
        trials.r = dataclasses.replace(recipe, trainer=TrainerConfig(checkpoint_dtype=dtype))
        found.append([trials._fingerprint(name) for name in ("l4", "l4.distilled")])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
