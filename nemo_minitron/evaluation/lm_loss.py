"""Forward passes of a sharded Megatron GPT over packed samples, and its language-model loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.megatron_gpt import forward_only


@dataclass(frozen=True)
class LMLoss:
    """Mean next-token cross-entropy in nats over `tokens` tokens of `samples` packed sequences; global."""

    nats: float
    tokens: int
    samples: int


def lm_loss(
    chunks: Sequence[Any],
    dataset: Any,
    samples: int,
    *,
    micro_batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> LMLoss:
    """Run the first `samples` samples through the model and return their loss, the same under every layout.

    Megatron-core's own forward-only schedule does the work, so pipeline stages take part; data-parallel ranks share the
    samples. Forward hooks see every microbatch, so importance is collected by the same call.

    Args:
        chunks: this rank's Megatron `GPTModel`s (one, without virtual pipeline stages).
        dataset: of Megatron's GPTDataset items: `tokens`, `labels`, `position_ids` int64 [s], `loss_mask` float32 [s],
            and where documents do not see each other `attention_mask` bool [1, s, s].
        samples: how many, at most len(dataset).
        micro_batch_size: samples in one forward pass of a rank.
        progress: called on every rank with the number of samples it has finished.

    Source: megatron/core/pipeline_parallel/schedules.py@0.13.1.
    """
    assert samples <= len(dataset)
    totals = torch.zeros(2, dtype=torch.float64, device=_device(chunks[0]))
    mine = range(parallel.dp_rank(), samples, parallel.dp_size())
    with evaluating(chunks):
        for begin in range(0, len(mine), micro_batch_size):
            indices = mine[begin : begin + micro_batch_size]
            for loss, count in _forward(chunks, [dataset[i] for i in indices]):
                totals += torch.stack([loss.double(), count.double()])
            if progress is not None:
                progress(begin + len(indices))
    parallel.broadcast_pp(totals, parallel.pp_size() - 1)
    parallel.all_reduce(totals, "dp")
    return LMLoss(float(totals[0] / totals[1]), int(totals[1]), samples)


def _forward(chunks: Sequence[Any], items: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """One forward-only schedule over one microbatch; (loss sum, token count) on the last stage, nothing elsewhere."""
    batch = stacked(items, _device(chunks[0]))
    found: list[tuple[Tensor, Tensor]] = []

    def step(iterator: Iterator[dict[str, Tensor]], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        b = next(iterator)
        # Without a mask the local layer spec makes a causal one itself, and Transformer Engine needs none.
        output = chunk(b["tokens"], b["position_ids"], b.get("attention_mask"), labels=b["labels"])

        def loss(per_token: Tensor) -> Any:
            found.append(((per_token.float() * b["loss_mask"]).sum(), b["loss_mask"].sum()))
            return per_token.new_zeros(()), {}

        return output, loss

    forward_only(step, chunks, [batch], (len(items), batch["tokens"].shape[1]))
    return found


_KEYS = ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")


@contextmanager
def evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Without dropout and gradients inside; afterwards each chunk is in the mode that it was in."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def stacked(items: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """A microbatch [b, s] of GPTDataset items [s]; `attention_mask` [b, 1, s, s] where they have one."""
    keys = [key for key in _KEYS if key in items[0]]
    return {k: torch.stack([item[k] for item in items]).to(device) for k in keys}


def _device(chunk: Any) -> torch.device:
    return next(chunk.parameters()).device
