"""Which units a plan keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning import Kept, PrunePlan, explicit_layers, make_plan

SOURCE = Architecture(4, 8, 6, 6, 2, 4, 16)
DIGEST = "a" * 64


def scored(**tensors: Tensor) -> Scores:
    return Scores(SOURCE, DIGEST, "l2", "mean", 4, 64, "b" * 64, tensors)


def plan(sizes: dict[str, int], scores: Scores | None = None, **options: Any) -> PrunePlan:
    return make_plan(SOURCE, SOURCE.replace(**sizes), scores, source_sha256=DIGEST, **options)


def test_hidden_channels_are_the_best_of_the_whole_network() -> None:
    scores = scored(hidden_size=torch.tensor([0.0, 5, 1, 5, 2, 9, 3, 0]))
    made = plan({"hidden_size": 3}, scores)
    assert made.kept == Kept(hidden_size=[1, 3, 5])
    assert made.scores == {
        "importance": "activation",
        "batch": "l2",
        "sequence": "mean",
        "samples": 4,
        "tokens": 64,
        "data_sha256": "b" * 64,
    }


def test_ties_go_to_the_lower_index() -> None:
    made = plan({"hidden_size": 5}, scored(hidden_size=torch.tensor([1.0, 1, 1, 2, 1, 1, 1, 1])))
    assert made.kept.hidden_size == [0, 1, 2, 3, 4]


def test_neurons_are_chosen_layer_by_layer() -> None:
    rows = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [0, 9, 0, 9, 0, 0], [3, 3, 3, 3, 3, 3]])
    made = plan({"ffn_hidden_size": 2}, scored(ffn_hidden_size=rows))
    assert made.kept == Kept(ffn_hidden_size=[[4, 5], [0, 1], [1, 3], [0, 1]])


def test_every_group_keeps_the_same_number_of_heads() -> None:
    # The second group is better throughout, and must still not keep more.
    rows = torch.tensor([[1.0, 3, 2, 9, 8, 7]] * 4)
    made = plan({"num_attention_heads": 4}, scored(num_attention_heads=rows))
    assert made.kept == Kept(num_attention_heads=[[1, 2, 3, 4]] * 4)


def test_whole_groups_go_with_their_heads() -> None:
    rows = torch.tensor([[1.0, 2], [2, 1], [5, 5], [0, 1]])
    made = plan({"num_query_groups": 1, "num_attention_heads": 3}, scored(num_query_groups=rows))
    assert made.kept.num_query_groups == [[1], [0], [0], [1]]
    assert made.kept.num_attention_heads == [[3, 4, 5], [0, 1, 2], [0, 1, 2], [3, 4, 5]]


def test_heads_are_chosen_inside_the_groups_that_stay() -> None:
    scores = scored(
        num_query_groups=torch.tensor([[1.0, 2]] * 4),
        num_attention_heads=torch.tensor([[9.0, 9, 9, 1, 3, 2]] * 4),
    )
    made = plan({"num_query_groups": 1, "num_attention_heads": 2}, scores)
    assert made.kept.num_attention_heads == [[4, 5]] * 4


def test_per_layer_lists_are_those_of_the_kept_layers() -> None:
    rows = torch.arange(24.0).view(4, 6) * torch.tensor([[1.0], [-1], [1], [-1]])
    scores = scored(ffn_hidden_size=rows)
    made = plan({"ffn_hidden_size": 1, "num_layers": 2}, scores, drop_layers=[0, 2])
    assert made.kept == Kept(layers=[1, 3], ffn_hidden_size=[[0], [0]])
    assert made.source_layers == [1, 3]


@pytest.mark.parametrize(
    ("importance", "options", "kept"),
    [
        ([3.0, 1, 0, 2], {}, [0, 3]),
        ([0.0, 1, 2, 3], {"protect_first": 1}, [0, 3]),
        ([3.0, 2, 1, 0], {"protect_last": 1}, [0, 3]),
        ([1.0, 1, 1, 1], {}, [0, 1]),
    ],
)
def test_the_least_important_layers_go(importance: list[float], options: dict, kept: list[int]) -> None:
    scores = scored(**{"layers/lm_loss": torch.tensor(importance)})
    made = plan({"num_layers": 2}, scores, layer_metric="lm_loss", **options)
    assert made.kept == Kept(layers=kept)
    assert made.scores["layer_metric"] == "lm_loss"


@pytest.mark.parametrize(
    ("importance", "options", "kept"),
    [
        ([5.0, 0, 2], {}, [0, 3]),
        ([0.0, 3, 2], {"protect_first": 1}, [0, 1]),
        ([3.0, 2, 0], {"protect_last": 1}, [0, 3]),
        ([1.0, 1, 1], {}, [2, 3]),
    ],
)
def test_the_least_important_block_goes(importance: list[float], options: dict, kept: list[int]) -> None:
    scores = scored(**{"blocks/block_influence/2": torch.tensor(importance)})
    assert plan({"num_layers": 2}, scores, contiguous=True, **options).kept == Kept(layers=kept)


def test_a_block_of_one_is_a_layer() -> None:
    scores = scored(**{"layers/block_influence": torch.tensor([3.0, 1, 0, 2])})
    assert plan({"num_layers": 3}, scores, contiguous=True).kept == Kept(layers=[0, 1, 3])


def test_explicit_layers_need_no_scores() -> None:
    assert plan({"num_layers": 2}, keep_layers=[3, 0]).kept == Kept(layers=[0, 3])
    assert plan({}, keep_layers=[0, 1, 2, 3]).kept == Kept()
    assert explicit_layers(32, drop=list(range(15, 31))) == [*range(15), 31]


@pytest.mark.parametrize(
    ("keep", "drop", "message"),
    [
        ([0, 4], None, r"keep_layers: 4 is out of range, the source's layers are 0 to 3"),
        (None, [-1], r"drop_layers: -1 is out of range"),
        (None, [1.0], r"drop_layers: 1.0 is out of range"),
        (None, [2, 2], r"drop_layers: layer 2 is listed twice"),
        ([0, 1], [1, 2, 3], r"layer 1 is in keep_layers and in drop_layers"),
        ([0, 1], [2], r"layer 3 is neither in keep_layers nor in drop_layers"),
        (None, [0, 1, 2, 3], r"no layer is left"),
        ([], None, r"no layer is left"),
    ],
)
def test_impossible_layer_lists_are_named(keep: list | None, drop: list | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explicit_layers(4, keep, drop)


@pytest.mark.parametrize(
    ("sizes", "tensors", "options", "message"),
    [
        ({"hidden_size": 4}, {}, {}, r"hidden_size: the scores hold none; they hold nothing"),
        ({"hidden_size": 4}, {"hidden_size": torch.full((8,), torch.nan)}, {}, r"NaN at \[0\]"),
        ({"hidden_size": 9}, {}, {}, r"hidden_size=9: larger than"),
        ({"num_layers": 3}, {}, {}, r"hold no 'layers/block_influence'"),
        ({"num_layers": 2}, {}, {"contiguous": True}, r"hold no 'blocks/block_influence/2'"),
        ({"num_layers": 3}, {}, {"contiguous": True}, r"hold no 'layers/block_influence'"),
        ({"num_layers": 1}, {}, {"protect_first": 1, "protect_last": 1}, r"leave 2 of 4 to choose from"),
        ({"num_layers": 3}, {}, {"keep_layers": [0]}, r"num_layers=3: but the listed layers keep 1"),
        (
            {"hidden_size": 4},
            {},
            {"importance": "taylor"},
            r"importance='taylor': must be activation or random",
        ),
        ({"num_layers": 1}, {}, {"head_residual": True, "keep_layers": [0]}, r"no query group loses heads"),
    ],
)
def test_impossible_plans_are_named(sizes: dict, tensors: dict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(sizes, scored(**tensors), **options)


def test_scores_of_another_model_are_refused() -> None:
    scores = scored(hidden_size=torch.ones(8))
    with pytest.raises(InputError, match="scores of another model"):
        make_plan(SOURCE, SOURCE.replace(hidden_size=4), scores, source_sha256="c" * 64)


def test_random_importance_depends_on_the_seed_alone() -> None:
    sizes = {"hidden_size": 4, "ffn_hidden_size": 3, "num_attention_heads": 4, "num_layers": 3}
    first = plan(sizes, importance="random", seed=7)
    assert first == plan(sizes, scored(hidden_size=torch.arange(8.0)), importance="random", seed=7)
    assert first.scores == {
        "importance": "random",
        "seed": 7,
        "contiguous": False,
        "protect_first": 0,
        "protect_last": 0,
    }
    assert len({str(plan(sizes, importance="random", seed=seed).kept) for seed in range(5)}) == 5


def test_random_ranks_alike_at_every_target() -> None:
    small = plan({"hidden_size": 2}, importance="random", seed=1).kept.hidden_size
    large = plan({"hidden_size": 5, "ffn_hidden_size": 2}, importance="random", seed=1).kept.hidden_size
    assert small is not None
    assert large is not None
    assert set(small) < set(large)


@pytest.mark.parametrize(("kept", "pairs"), [(2, [[0, 1], [4, 5]]), (1, [[2, 0], [3, 4]])])
def test_head_residual_pairs_follow_the_formula(kept: int, pairs: list[list[int]]) -> None:
    """L = 3 heads a group: K = 2 kept, rank 2 takes in rank 2K - 2 + 1 = 3; K = 1, rank 1 takes in 2."""
    # Ranks in group 0: heads 2, 0, 1; in group 1: heads 3, 4, 5.
    rows = torch.tensor([[2.0, 1, 3, 9, 8, 7]] * 4)
    made = plan({"num_attention_heads": 2 * kept}, scored(num_attention_heads=rows), head_residual=True)

    assert made.head_residual == [pairs] * 4


def test_plans_are_values() -> None:
    made = plan({"hidden_size": 4}, importance="random")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.source_sha256 = "other"  # type: ignore[misc]
