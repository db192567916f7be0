"""The harness itself, and the fixture model against the independent reference under every layout."""

import os
import time

import pytest
import torch

from nemo_minitron import parallel
from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from tests.support.ranks import RankError, layout
from tests.support.reference import Reference, forward_logits, full_state_dict, full_weights, tiny_model

LLAMA = Architecture(4, 16, 24, 8, 4, 6, vocab_size=32)
GPT = Architecture(
    4, 16, 24, 4, 4, 4, 32, False, "LayerNorm", True, True, True, "learned_absolute", 16, "gelu"
)  # fmt: skip


def rank_of(world_size: int) -> tuple[int, int]:
    at = layout(tp=world_size)
    return parallel.tp_rank(), at.tp


def fail_on_rank_1() -> None:
    layout(tp=2)
    if parallel.tp_rank() == 1:
        raise InputError("hidden_size=7: no")
    parallel.all_reduce(torch.ones(1), "tp")


def die_on_rank_1() -> None:
    layout(tp=2)
    if parallel.tp_rank() == 1:
        os._exit(7)
    parallel.all_reduce(torch.ones(1), "tp")


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_results_come_by_rank(run_on_ranks):
    assert run_on_ranks(2, rank_of, 2) == [(0, 2), (1, 2)]
    assert run_on_ranks(1, rank_of, 1) == [(0, 1)]


def test_the_failing_ranks_error_is_raised_and_the_next_call_works(run_on_ranks):
    with pytest.raises(InputError, match="hidden_size=7") as caught:
        run_on_ranks(2, fail_on_rank_1)
    assert "rank 1" in str(caught.value.__cause__)
    with pytest.raises(RankError, match="exit code 7"):
        run_on_ranks(2, die_on_rank_1)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] within 0.5 s"):
        run_on_ranks(2, sleep, 30.0, timeout=0.5)
    assert run_on_ranks(2, rank_of, 2) == [(0, 2), (1, 2)]


def model_matches(arch: Architecture, sizes: dict, options: dict) -> None:
    at = layout(**sizes)
    tokens = torch.randint(arch.vocab_size, (4, 8), generator=torch.Generator().manual_seed(5))
    model = tiny_model(arch, sequence_parallel=at.sp, **options)
    weights = full_weights(arch)
    expected = Reference(weights, arch)(tokens)
    torch.testing.assert_close(forward_logits(model, tokens, 2), expected, rtol=1e-4, atol=1e-5)
    gathered = full_state_dict(model)
    assert len(gathered) == len(weights)
    torch.testing.assert_close(Reference(gathered, arch)(tokens), expected)


@pytest.mark.parametrize("arch", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"tp": 2}, {}),
        ({"tp": 2, "sp": True}, {"fused_norms": True}),
        ({"pp": 2}, {"num_layers_in_first_pipeline_stage": 1}),
    ],
    ids=["tp2", "tp2-sp-fused", "pp2-uneven"],
)
def test_tiny_model_computes_the_references_logits(run_on_ranks, arch, sizes, options):
    run_on_ranks(2, model_matches, arch, sizes, options)
