"""Streaming statistics over a sample's tokens, then over samples: the nine (batch x sequence) aggregations.

Minitron (arXiv 2407.14679, section 2.2) scores a unit by its activation x[t, j] at token t of sample j,
reduced first along the sequence to y[j], then along the batch to one number, each time by one of

* mean: of absolute values, (1/n) sum |x|;
* l2: the Euclidean norm, sqrt(sum x^2), not divided by n;
* var: the population variance, (1/n) sum (x - mean)^2, of the signed values.

l2 and var are not linear and a sequence may be spread over ranks, so what travels are moments: those of each
sample are merged over sequence- and context-parallel ranks before its statistic is taken, those of the
batch over data-parallel ranks at the end. Variances are merged as (n, mean, sum of squared deviations),
after Chan, Golub and LeVeque (1983), which does not cancel as a difference of large sums does. Every sum is
in float32 or wider, also for bfloat16 activations; nothing is kept for a token.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import InputError
from nemo_minitron.parallel import GroupName

Statistic = Literal["mean", "l2", "var"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


def check_statistic(where: str, value: str) -> None:
    """Refuse an unknown statistic.

    Raises:
        InputError: `value` is none of mean, l2 and var.
    """
    if value not in STATISTICS:
        raise InputError(f"{where}={value!r}: must be one of {', '.join(STATISTICS)}")


def sequence_moments(x: Tensor, statistic: Statistic) -> Tensor:
    """The moments of one rank's tokens that `sequence_statistic` needs.

    Args:
        x: activations [s, b, n], the rank's own tokens and units, any floating dtype.
        statistic: along s.

    Returns:
        float32 [k, b, n]: the sum of absolute values or of squares (k = 1); mean and squared deviations (k
        = 2).
    """
    if statistic == "mean":
        # Not vector_norm(ord=1, dim=0): that is ten times slower on the CPU (torch 2.13).
        return x.abs().sum(0, keepdim=True, dtype=torch.float32)
    x = x.float()
    if statistic == "l2":
        return x.square().sum(0, keepdim=True)
    mean = x.mean(0)
    return torch.stack((mean, (x - mean).square_().sum(0)))


def sequence_statistic(
    moments: Tensor, tokens: int, statistic: Statistic, groups: Sequence[GroupName] = ()
) -> Tensor:
    """Merge moments over the ranks that share the samples' tokens, and take the statistic of each sample.

    Args:
        moments: float32 [..., k, b, n] from `sequence_moments`; overwritten.
        tokens: s, the rank's own tokens of each sample, the same number on every rank.
        statistic: along s.
        groups: over which the sequence is split; each holds every unit of `moments` on all of its ranks.

    Returns:
        float32 [..., b, n], the same on every rank of `groups`.
    """
    for group in groups:
        ranks = parallel.group_size(group)
        if statistic == "var" and ranks > 1:
            mean, deviations = moments.select(-3, 0), moments.select(-3, 1)
            count = torch.tensor(tokens, dtype=mean.dtype, device=mean.device)
            moments = torch.stack(_merge_variance(count, mean, deviations, group)[1:], dim=-3)
        else:
            parallel.all_reduce(moments, group)
        tokens *= ranks
    if statistic == "var":
        return moments.select(-3, 1) / tokens
    total = moments.squeeze(-3)
    return total / tokens if statistic == "mean" else total.sqrt()


class BatchMoments:
    """Accumulates a statistic over samples: a count and one or two float64 numbers for each unit."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.count = 0
        # The sum of absolute values or of squares; for var the mean and the sum of squared deviations.
        self._total = self._deviations = torch.zeros((), dtype=torch.float64)

    def add(self, y: Tensor) -> None:
        """Take in b samples: y [..., b, n], the statistic of each along its sequence."""
        y, b = y.double(), y.shape[-2]
        if self.count == 0:
            self._total = self._deviations = y.new_zeros(y.select(-2, 0).shape)
        if self.statistic == "mean":
            self._total = self._total + y.abs().sum(-2)
        elif self.statistic == "l2":
            self._total = self._total + y.square().sum(-2)
        else:
            mean = y.mean(-2)
            deviations = (y - mean.unsqueeze(-2)).square().sum(-2)
            shift, share = mean - self._total, b / (self.count + b)
            self._total = self._total + shift * share
            self._deviations = self._deviations + deviations + shift.square() * (self.count * share)
        self.count += b

    def merge(self, group: GroupName) -> None:
        """Merge with the other ranks of the group, which scored other samples of the same units.

        Raises:
            InputError: a rank has no sample (raised on every rank).
        """
        device = self._total.device
        counts = parallel.all_gather(torch.tensor(self.count, device=device), group)
        if not min(int(c) for c in counts):
            raise InputError("calibration: every data-parallel rank needs at least one sample")
        if self.statistic == "var" and len(counts) > 1:
            count = torch.tensor(self.count, dtype=torch.float64, device=device)
            _, self._total, self._deviations = _merge_variance(count, self._total, self._deviations, group)
        else:
            # A copy: under torch.inference_mode the sums may not be written to later.
            self._total = parallel.all_reduce(self._total.clone(), group)
        self.count = sum(int(c) for c in counts)

    def result(self) -> Tensor:
        """The statistic, float64 [..., n]; not finite where a sample's was not."""
        assert self.count, "no samples"
        if self.statistic == "l2":
            return self._total.sqrt()
        return (self._total if self.statistic == "mean" else self._deviations) / self.count


def _merge_variance(
    count: Tensor, mean: Tensor, deviations: Tensor, group: GroupName
) -> tuple[Tensor, Tensor, Tensor]:
    """Count [], mean and squared deviations (any shape) over the whole group, in two steps: where each
    rank's mean lies is known only once the common mean is."""
    total = parallel.all_reduce(count.clone(), group)
    common = parallel.all_reduce(mean * (count / total), group)
    shifted = deviations + count * (mean - common).square()
    return total, common, parallel.all_reduce(shifted, group)
