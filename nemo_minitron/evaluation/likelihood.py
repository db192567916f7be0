"""Log-likelihoods of continuations under a sharded Megatron GPT: what benchmarks of given choices ask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.evaluation.lm_loss import evaluating
from nemo_minitron.evaluation.multiple_choice import Request, right_padded
from nemo_minitron.evaluation.token_scores import Head, token_scores
from nemo_minitron.megatron_gpt import final_hidden_states, gpt_model, output_weight

# Log-probability in nats, and whether each token is the most probable one where it stands.
Likelihood = tuple[float, bool]


def head_of(chunks: Sequence[Any], vocab_size: int) -> Head | None:
    """The output layer of the last stage; None on others."""
    last = gpt_model(chunks[-1])
    return Head(output_weight(last).detach(), vocab_size) if last.post_process else None


def log_likelihoods(
    chunks: Sequence[Any],
    requests: Sequence[Request],
    vocab_size: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The log-probability of each request's last `scored` tokens after those before them; every rank calls.

    Requests that differ in nothing but the last token (one-letter answers) share one row of a forward pass. Logits are
    made of the scored positions only.

    Args:
        chunks: this rank's GPTModels.
        requests: the same on every rank; data-parallel ranks share the batches.
        vocab_size: without padding.
        batch_size: rows in one forward pass.
        progress: called on every rank with about how many requests all ranks together have finished.

    Returns:
        By request, the same on every rank.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        rows.setdefault(tuple(request.tokens[:-1]), []).append(number)
    # Batches of similar lengths need little padding; the longest come first, and show at once whether memory suffices.
    order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
    device, done = next(chunks[0].parameters()).device, 0
    totals = torch.zeros(2, len(requests), dtype=torch.float64, device=device)
    head = head_of(chunks, vocab_size)
    with evaluating(chunks):
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            if begin // batch_size % parallel.dp_size() == parallel.dp_rank():
                picked = [(row, n) for row, tokens in enumerate(batch) for n in rows[tokens]]
                _score(chunks, head, batch, [(row, n, requests[n]) for row, n in picked], totals)
            done += sum(len(rows[tokens]) for tokens in batch)
            if progress is not None:
                progress(done)
    parallel.broadcast_pp(totals, parallel.pp_size() - 1)
    parallel.all_reduce(totals, "dp")
    return [(value, wrong == 0) for value, wrong in zip(*totals.tolist(), strict=True)]


def _score(
    chunks: Sequence[Any],
    head: Head | None,
    batch: list[tuple[int, ...]],
    picked: list[tuple[int, int, Request]],
    totals: Tensor,
) -> None:
    """Add one forward pass's to the totals [2, requests]: log-probabilities, and how many tokens are not the best.

    Args:
        batch: the rows' tokens.
        picked: (row, number, request) of those that are scored in it.
    """
    device = totals.device
    padded = {name: tensor.to(device) for name, tensor in right_padded(batch).items()}
    hidden = final_hidden_states(chunks, padded)
    if head is None:
        return
    assert hidden is not None
    places = [
        (position - 1, row, request.tokens[position], number)
        for row, number, request in picked
        for position in range(len(request.tokens) - request.scored, len(request.tokens))
    ]
    position, row, label, number = torch.tensor(places, device=device).t()
    found = token_scores(hidden[position, row], head, label)
    totals[0].index_add_(0, number, found.log_probs.double())
    totals[1].index_add_(0, number, (found.best != label).double())
