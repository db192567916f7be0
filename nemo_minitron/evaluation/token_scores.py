"""What a vocabulary-parallel output layer says of tokens, out of final hidden states: a block of logits at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel

# Positions whose logits, [block, v/tp] float32, are held at once.
_BLOCK = 512


@dataclass(frozen=True)
class Head:
    """A model's output layer. `weight`: the rank's rows [v/tp, h], padding included; `vocab_size`: without padding."""

    weight: Tensor
    vocab_size: int

    @property
    def first(self) -> int:
        """The first token that this rank has."""
        return parallel.tp_rank() * len(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [n, columns] of the rank's true columns (none, where a small vocabulary leaves it nothing)."""
        columns = min(max(self.vocab_size - self.first, 0), len(self.weight))
        return (hidden @ self.weight[:columns].t()).float()


@dataclass(frozen=True)
class TokenScores:
    """Of n positions, alike on all tensor-parallel ranks. `log_probs`: of the labels, float32 [n], nats; `best`: the
    most probable tokens, int64 [n]."""

    log_probs: Tensor
    best: Tensor


def token_scores(hidden: Tensor, head: Head, labels: Tensor) -> TokenScores:
    """Log-probabilities of labels, and which tokens are the most probable.

    Args:
        hidden: [n, h], the same on all tensor-parallel ranks.
        labels: int64 [n], what comes after each.
    """
    found = []
    for part in _blocks(len(hidden)):
        logits = head.logits(hidden[part])
        peak, best = _best(logits, head.first)
        found.append((_label_logits(logits, labels[part], head.first) - _log_sum(logits, peak), best))
    return TokenScores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def divergences(hidden: Tensor, head: Head, of_teacher: Tensor, teachers: Head) -> tuple[Tensor, Tensor]:
    """KL(teacher || model) in nats, float32 [n], and whether both have the same most probable token, bool [n].

    Args:
        hidden, of_teacher: final hidden states [n, h] and [n, h_t].
        head, teachers: of one vocabulary, cut alike over the ranks.
    """
    assert head.vocab_size == teachers.vocab_size
    found = []
    for part in _blocks(len(hidden)):
        own, other = head.logits(hidden[part]), teachers.logits(of_teacher[part])
        (peak, best), (other_peak, other_best) = _best(own, head.first), _best(other, teachers.first)
        own -= _log_sum(own, peak)[:, None]
        other -= _log_sum(other, other_peak)[:, None]
        kl = parallel.all_reduce((other.exp() * (other - own)).sum(1), "tp")
        found.append((kl, best == other_best))
    kl, agree = (torch.cat(parts) for parts in zip(*found, strict=True))
    return kl, agree


def _blocks(count: int) -> Iterator[slice]:
    return (slice(begin, begin + _BLOCK) for begin in range(0, max(count, 1), _BLOCK))


def _best(logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The largest logit of all ranks' [n] and its token [n]; of equal ones the first."""
    if logits.shape[1]:
        peak, column = logits.max(1)
    else:
        peak = logits.new_full((len(logits),), torch.finfo(logits.dtype).min)
        column = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    if parallel.tp_size() == 1:
        return peak, column + first
    peaks = torch.stack(parallel.all_gather_tp(peak))
    tokens = torch.stack(parallel.all_gather_tp(column + first))
    rank = peaks.argmax(0, keepdim=True)
    return peaks.gather(0, rank)[0], tokens.gather(0, rank)[0]


def _log_sum(logits: Tensor, peak: Tensor) -> Tensor:
    """log of the sum of e to all ranks' logits, [n]."""
    return peak + parallel.all_reduce((logits - peak[:, None]).exp_().sum(1), "tp").log()


def _label_logits(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    columns = labels - first
    mine = (columns >= 0) & (columns < logits.shape[1])
    padded = torch.nn.functional.pad(logits, (0, 1)) if not logits.shape[1] else logits
    picked = padded.gather(1, columns.where(mine, 0)[:, None])[:, 0]
    return parallel.all_reduce(picked.where(mine, 0), "tp")
