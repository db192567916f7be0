"""The teacher's most probable tokens out of its hidden states, without the logits of all tokens at once."""

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.loss.fused import chunk_tokens, default_chunk_bytes
from nemo_minitron.distillation.loss.matmul import write_logits
from nemo_minitron.distillation.loss.vocabulary import vocab_shard


def most_probable(
    hidden: Tensor,
    head: Tensor,
    k: int,
    temperature: float,
    *,
    vocab_size: int,
    chunk_bytes: int | None = None,
) -> dict[str, Tensor]:
    """The k largest logits of each token, and the log-sum-exp of all others; every tensor-parallel rank calls.

    Logits and sums are float32. They are given minus the token's
    largest logit, which no divergence can tell, so that the important ones are near 0 and survive 16 bits.

    Args:
        hidden: [n, h], alike on every rank.
        head: [v/tp, h], the rank's own rows.
        k: at most `vocab_size`.
        temperature: T of the tail.
        vocab_size: the output layer's rows that count, of all ranks together.
        chunk_bytes: of a chunk's logits.

    Returns:
        On every rank `values` float32 [n, k], descending, `indices` int32 [n, k] and `tail_logsumexp` float32 [n]
        (of (logit - largest) / T; minus infinity where k is the whole vocabulary).
    """
    budget = default_chunk_bytes(head.device) if chunk_bytes is None else chunk_bytes
    most = chunk_tokens(len(hidden), len(head), 1, 4, budget, head.device)
    columns = vocab_shard(len(head), vocab_size).columns
    parts = [_chunk(rows, head, columns, k, temperature) for rows in hidden.split(most)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunk(hidden: Tensor, head: Tensor, true: int, k: int, temperature: float) -> dict[str, Tensor]:
    logits = hidden.new_empty(len(hidden), len(head), dtype=torch.float32)
    write_logits(logits, hidden, head)
    logits[:, true:] = -torch.inf
    first = parallel.tp_rank() * len(head)
    own, columns = logits.topk(min(k, len(head)), dim=1)
    candidates = torch.cat(parallel.all_gather_tp(own), dim=1)
    tokens = torch.cat(parallel.all_gather_tp(columns + first), dim=1)
    values, places = candidates.topk(k, dim=1)
    indices = tokens.gather(1, places)
    largest = values[:, :1]
    mine = indices - first
    here = (mine >= 0) & (mine < len(head))
    # Where a token is another rank's, the row's column 0 would be hit: a minimum with infinity changes nothing.
    gone = torch.where(here, -torch.inf, torch.inf)
    logits.scatter_reduce_(1, mine.where(here, 0), gone, "amin")
    # Minus infinity where no other token is left.
    peak = parallel.all_reduce(logits.amax(1, keepdim=True), "tp", "max")
    shifted = logits.sub_(peak.clamp(min=torch.finfo(torch.float32).min)).div_(temperature).exp_()
    total = parallel.all_reduce(shifted.sum(1), "tp")
    tail = total.log() + ((peak - largest) / temperature)[:, 0]
    return {"values": values - largest, "indices": indices.int(), "tail_logsumexp": tail}
