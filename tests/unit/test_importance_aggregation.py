"""The nine aggregations against numpy's formulas over the whole batch, and what streaming must not change."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.errors import InputError
from nemo_minitron.importance.aggregation import (
    STATISTICS,
    BatchMoments,
    check_statistic,
    sequence_moments,
    sequence_statistic,
)

FORMULAS = {
    "mean": lambda x, axis: np.abs(x).mean(axis),
    "l2": lambda x, axis: np.sqrt((x**2).sum(axis)),
    "var": lambda x, axis: x.var(axis),
}


def expected(x: torch.Tensor, batch: str, sequence: str) -> torch.Tensor:
    """[s, b, n] -> [n] by the paper's formulas, in float64."""
    return torch.from_numpy(FORMULAS[batch](FORMULAS[sequence](x.double().numpy(), 0), 0))


def streamed(x: torch.Tensor, batch: str, sequence: str, sizes: list[int]) -> torch.Tensor:
    moments = BatchMoments(batch)
    for part in x.split(sizes, dim=1):
        moments.add(sequence_statistic(sequence_moments(part, sequence), x.shape[0], sequence))
    return moments.result()


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(STATISTICS, STATISTICS)))
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    s=st.integers(1, 9),
    n=st.integers(1, 5),
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_streaming_over_any_batches_gives_the_formula(batch, sequence, sizes, s, n, offset, seed):
    x = offset + torch.randn(s, sum(sizes), n, generator=torch.Generator().manual_seed(seed))
    # Deviations from a mean of 100 are known to the precision that float32 has at 100.
    atol = 1e-6 + 1e-4 * abs(offset) / 100
    torch.testing.assert_close(
        streamed(x, batch, sequence, sizes), expected(x, batch, sequence), rtol=2e-5, atol=atol
    )


@pytest.mark.parametrize("sequence", STATISTICS)
def test_bfloat16_activations_are_summed_in_float32(sequence):
    # 4096 ones and a large value: in bfloat16 the sum would stop growing at 256.
    x = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    x[::2] *= -1
    got = sequence_statistic(sequence_moments(x, sequence), 4096, sequence)
    assert float(got) == pytest.approx({"mean": 1.0, "l2": 64.0, "var": 1.0}[sequence], rel=1e-6)


def test_variance_over_samples_does_not_cancel():
    y = torch.tensor([1e6, 1e6 + 1, 1e6 + 2]).view(3, 1)
    moments = BatchMoments("var")
    for sample in y:
        moments.add(sample.view(1, 1))
    assert float(moments.result()) == pytest.approx(2 / 3, rel=1e-9)


def test_no_samples_is_refused_and_so_is_an_unknown_statistic():
    with pytest.raises(InputError, match="at least one sample"):
        BatchMoments("l2").merge("dp")
    with pytest.raises(InputError, match=r"prune.batch_aggregation='median': must be one of mean, l2, var"):
        check_statistic("prune.batch_aggregation", "median")
