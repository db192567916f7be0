"""A loaded teacher's forward passes over given sequences, and what is kept of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.cache.format import Contents
from nemo_minitron.distillation.cache.top_k_logits import most_probable
from nemo_minitron.distillation.cache.writer import CachePlan
from nemo_minitron.evaluation.lm_loss import evaluating
from nemo_minitron.megatron_gpt import forward_only, give_hidden_states, no_loss, output_weight
from nemo_minitron.progress import progress_bar

Keep = Callable[[Tensor], dict[str, Tensor]]


def write_states(
    chunk: Any,
    plan: CachePlan,
    numbers: Sequence[int],
    sequence: Callable[[int], Tensor],
    *,
    micro_batch_size: int,
) -> None:
    """Write shards of a cache, and the teacher's output layer where the form keeps it; with progress.

    Every rank of the layout calls: data-parallel ranks take shards in turn, the last stage's first tensor-parallel rank
    writes. A shard waits in memory until it is whole.

    Args:
        chunk: this rank's Megatron GPTModel; from now on it returns its final hidden states unless labels are given.
        plan: what is written.
        numbers: of the shards, the same on every rank.
        sequence: the tokens int64 [s] of a sequence by its number.
        micro_batch_size: sequences in a forward pass.
    """
    writes = chunk.post_process and parallel.tp_rank() == 0
    if chunk.post_process:
        give_hidden_states(chunk)
        if plan.contents.form == "hidden":
            head = head_of(chunk, plan.contents)
            if writes and parallel.dp_rank() == 0:
                plan.write_head(head)
    keep = keeper(plan.contents, chunk)
    mine = numbers[parallel.dp_rank() :: parallel.dp_size()]
    show, done = progress_bar("caching", sum(len(plan.shards[n]) for n in mine)), 0
    for number in mine:
        tokens = torch.stack([sequence(i) for i in plan.shards[number]])
        kept = _states(chunk, tokens, micro_batch_size, keep)
        if writes:
            plan.write_shard(number, tokens, kept)
        done += len(tokens)
        if show is not None:
            show(done)


def head_of(chunk: Any, contents: Contents) -> Tensor:
    """The whole output layer [v, h] of a GPTModel, without padding; every tensor-parallel rank calls."""
    return torch.cat(parallel.all_gather_tp(output_weight(chunk).detach()))[: contents.vocab_size]


def keeper(contents: Contents, chunk: Any) -> Keep:
    """From a microbatch's final hidden states, [s, b, h] or [s/tp, b, h], to what is kept, [b, s, ...] on the CPU."""

    def keep(hidden: Tensor) -> dict[str, Tensor]:
        whole = parallel.gather_sequence(hidden) if chunk.config.sequence_parallel else hidden
        states = whole.transpose(0, 1)
        if contents.form == "hidden":
            return {"hidden": states.cpu()} if parallel.tp_rank() == 0 else {}
        assert contents.top_k is not None
        assert contents.temperature is not None
        head = output_weight(chunk)
        found = most_probable(
            states.flatten(0, 1),
            head,
            contents.top_k,
            contents.temperature,
            vocab_size=contents.vocab_size,
        )
        return {name: t.unflatten(0, states.shape[:2]).cpu() for name, t in found.items()}

    return keep


def _states(chunk: Any, tokens: Tensor, micro_batch_size: int, keep: Keep) -> dict[str, Tensor]:
    """`keep` of the final hidden states of sequences tokens [n, s], each tensor [n, ...]; empty but on the last stage.

    Whole microbatches go through the pipeline together, a smaller last one on its own: a schedule knows one size.
    """
    whole = len(tokens) - len(tokens) % micro_batch_size
    found: list[dict[str, Tensor]] = []
    for part in (tokens[:whole], tokens[whole:]):
        if len(part):
            _forward(chunk, part.split(micro_batch_size), lambda hidden: found.append(keep(hidden)))
    names = found[0] if found else {}
    return {name: torch.cat([each[name] for each in found]) for name in names}


def _forward(chunk: Any, microbatches: Sequence[Tensor], take: Callable[[Tensor], None]) -> None:
    """Megatron's forward-only schedule over tokens [b, s]; `take` gets what leaves the last stage."""
    device = next(chunk.parameters()).device

    def step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        tokens = next(iterator).to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        output = model(tokens, positions, None)
        if model.post_process:
            take(output)
        return output, no_loss

    with evaluating([chunk]):
        b, s = microbatches[0].shape
        forward_only(step, [chunk], microbatches, (b, s))
