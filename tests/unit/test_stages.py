"""Which numbers of layers a pipeline layout holds: as many on each stage as Megatron itself says."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_minitron.config.trainer import TrainerConfig, check_stages, check_tensor_ranks
from nemo_minitron.errors import InputError

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def megatron_holds(pp: int, num_layers: int, sizes: dict[str, int]) -> bool:
    """Whether Megatron puts every layer onto one of the stages, and none is empty."""
    from unittest import mock

    from megatron.core.transformer import transformer_block

    names = ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", FIRST, LAST)
    config = SimpleNamespace(**dict.fromkeys(names), num_layers=num_layers, pipeline_model_parallel_size=pp)
    config.account_for_embedding_in_pipeline_split = config.account_for_loss_in_pipeline_split = False
    vars(config).update(sizes)
    stages = []
    state: Any = transformer_block.parallel_state
    for rank in range(pp):
        with (
            mock.patch.object(state, "get_pipeline_model_parallel_rank", return_value=rank),
            mock.patch.object(state, "get_pipeline_model_parallel_world_size", return_value=pp),
            mock.patch.object(state, "is_pipeline_first_stage", return_value=rank == 0),
            mock.patch.object(state, "is_pipeline_last_stage", return_value=rank == pp - 1),
        ):
            try:
                stages.append(transformer_block.get_num_layers_to_build(config))
            except AssertionError:
                return False
    return sum(stages) == num_layers and min(stages) > 0


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_what_is_refused_is_what_megatron_cannot_hold(pp: int) -> None:
    choices = [None, 0, 1, 2, 5] if pp > 1 else [None]
    for first in choices:
        for last in choices:
            sizes = {name: n for name, n in ((FIRST, first), (LAST, last)) if n is not None}
            t = TrainerConfig(pipeline_model_parallel_size=pp, **sizes)
            for num_layers in range(1, 10):
                if pp > num_layers and not sizes:
                    continue  # refused elsewhere too, with another message
                try:
                    check_stages(t, num_layers, "num_layers")
                    held = True
                except InputError:
                    held = False
                assert held == megatron_holds(pp, num_layers, sizes), (pp, num_layers, sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"pipeline_model_parallel_size": 2},
            "trainer.pipeline_model_parallel_size=2: does not divide layers 7",
        ),
        (
            {FIRST: 3},
            f"trainer.{FIRST}=3: must be at least 1, and needs trainer.pipeline_model_parallel_size",
        ),
        (
            {"pipeline_model_parallel_size": 3, FIRST: 2},
            f"trainer.{FIRST}=2: 5 of layers 7 are left for the 2 other stages",
        ),
        (
            {"pipeline_model_parallel_size": 2, FIRST: 2, LAST: 2},
            f"trainer.{FIRST}=2, trainer.{LAST}=2: 3 of layers 7 are left for the 0 other stages",
        ),
    ],
)
def test_refusals_name_what_would_be_legal(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_stages(TrainerConfig(**sizes), 7, "layers")


@pytest.mark.parametrize("sizes", [(2, 48), (1, 48), (6, 40), (8, 64)], ids=str)
def test_tensor_ranks_that_are_refused_are_those_that_megatron_refuses(sizes: tuple[int, int]) -> None:
    """More ranks than query groups too; the values that the message names are the legal ones."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups, ffn = sizes
    shared = {"the source's num_query_groups": groups, "the source's ffn_hidden_size": ffn}
    legal = []
    for ranks in range(1, 2 * groups + 1):
        try:
            TransformerConfig(
                num_layers=1,
                hidden_size=48,
                num_attention_heads=48,
                num_query_groups=groups,
                tensor_model_parallel_size=ranks,
            )
            held = ffn % ranks == 0
        except ValueError:
            held = False
        try:
            check_tensor_ranks("trainer.tensor_model_parallel_size", ranks, shared)
            assert held
            legal.append(ranks)
        except InputError as error:
            assert not held
            said = str(error)
    assert said.startswith(
        f"trainer.tensor_model_parallel_size={2 * groups}: does not divide the source's num_query"
    )
    assert said.endswith(f"legal here: {', '.join(map(str, legal))}")
