"""Pruning in steps: legal sizes on the way, and one plan that does what all of them do."""

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import PrunePlan, check_target, compose, make_plan, step_targets
from tests.support.pruned_by_hand import slice_weights
from tests.support.pruning_strategies import architectures, kept_sets
from tests.support.reference import full_weights

LLAMA_31_8B = Architecture(32, 4096, 14336, 32, 8, 128, 128256)
SMALL = Architecture(8, 192, 512, 8, 4, 24, 1024)


@pytest.mark.parametrize(
    ("source", "target", "iterations", "axis", "sizes"),
    [
        (LLAMA_31_8B, {"num_layers": 16}, 4, "num_layers", [28, 24, 20, 16]),
        (LLAMA_31_8B, {"ffn_hidden_size": 9216}, 2, "ffn_hidden_size", [11776, 9216]),
        (LLAMA_31_8B, {"hidden_size": 3072}, 3, "hidden_size", [3840, 3328, 3072]),
        (SMALL, {"num_layers": 6}, 1, "num_layers", [6]),
        (SMALL, {"num_layers": 5}, 3, "num_layers", [7, 6, 5]),
        (SMALL, {"ffn_hidden_size": 501}, 2, "ffn_hidden_size", [507, 501]),
        (SMALL, {"num_query_groups": 2, "num_attention_heads": 2}, 2, "num_attention_heads", [6, 2]),
    ],
)
def test_sizes_on_the_way(source, target, iterations, axis, sizes):
    steps = step_targets(source, source.replace(**target), iterations)
    assert [getattr(step, axis) for step in steps] == sizes
    assert steps[-1] == source.replace(**target)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_step_is_legal_and_smaller(data):
    source = data.draw(architectures())
    sizes, _ = data.draw(kept_sets(source))
    target, iterations = source.replace(**sizes), data.draw(st.integers(1, 5))
    axes = ("hidden_size", "ffn_hidden_size", "num_layers", "num_query_groups", "heads_per_group")
    most = max(getattr(source, axis) - getattr(target, axis) for axis in axes)
    steps = []
    # As many steps as the axis that shrinks most has units are always possible.
    with contextlib.nullcontext() if iterations <= most else contextlib.suppress(InputError):
        steps = step_targets(source, target, iterations)
    if not steps:
        return
    assert len(steps) == iterations
    assert steps[-1] == target
    for before, after in zip([source, *steps], steps, strict=False):
        assert before != after
        check_target(before, after)


@pytest.mark.parametrize(("iterations", "step"), [(3, 2), (9, 1)])
def test_a_step_without_change_is_refused(iterations, step):
    with pytest.raises(InputError, match=f"iterations={iterations}: step {step} would change no size"):
        step_targets(SMALL, SMALL.replace(num_layers=6), iterations)


def test_no_step_is_refused():
    with pytest.raises(InputError, match="iterations=0: must be at least 1"):
        step_targets(SMALL, SMALL.replace(num_layers=6), 0)


def test_listed_layers_go_first():
    target = SMALL.replace(num_layers=4, hidden_size=128)
    steps = step_targets(SMALL, target, 2, layers_at_once=True)
    assert [(step.num_layers, step.hidden_size) for step in steps] == [(4, 160), (4, 128)]
    with pytest.raises(InputError, match="iterations=2: step 2 would change no size"):
        step_targets(SMALL, SMALL.replace(num_layers=4), 2, layers_at_once=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_plan_cuts_as_all_of_them(data):
    source, plans = data.draw(architectures()), []
    for _ in range(data.draw(st.integers(1, 3))):
        before = plans[-1].target if plans else source
        sizes, kept = data.draw(kept_sets(before))
        plans.append(PrunePlan("", before, before.replace(**sizes), {"seed": len(plans)}, kept))
    expected = full_weights(source)
    for plan in plans:
        expected = slice_weights(expected, plan)
    whole = compose(plans)
    assert (whole.source, whole.target, whole.scores["seed"]) == (source, plans[-1].target, 0)
    found = slice_weights(full_weights(source), whole)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_axes_left_alone_stay_null_and_the_steps_are_told(tmp_path):
    plans, before = [], SMALL
    for seed, after in enumerate(step_targets(SMALL, SMALL.replace(ffn_hidden_size=256, num_layers=6), 2)):
        plans.append(make_plan(before, after, importance="random", seed=seed, source_sha256="abc"))
        before = after
    whole = compose(plans)
    whole.save(tmp_path / "plan.json")
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["kept"]["hidden_size"] is read["kept"]["num_attention_heads"] is None
    assert read["scores"]["steps"] == [
        {"num_layers": 7, "ffn_hidden_size": 384},
        {"num_layers": 6, "ffn_hidden_size": 256},
    ]
    assert (read["scores"]["iterations"], read["source_sha256"]) == (2, "abc")
    assert PrunePlan.load(tmp_path / "plan.json") == whole
