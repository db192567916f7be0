"""How a sharded Megatron GPT predicts held-out text: loss, accuracy, and the agreement with a teacher."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.evaluation.likelihood import head_of
from nemo_minitron.evaluation.lm_loss import evaluating, stacked
from nemo_minitron.evaluation.token_scores import Head, divergences, token_scores
from nemo_minitron.megatron_gpt import final_hidden_states


@dataclass(frozen=True)
class LMFigures:
    """Means over `tokens` next tokens of `samples` packed sequences; global.

    Attributes:
        nats: cross-entropy. `stderr`: its standard error over the sequences.
        accuracy: how often the right token is the most probable one.
        kl: KL(teacher || model) in nats. `agreement`: how often both have the same most probable token. None: no
            teacher.
        teacher_nats: the teacher's cross-entropy.
        sequences: of each sequence, its summed cross-entropy and its tokens.
    """

    nats: float
    stderr: float
    accuracy: float
    tokens: int
    samples: int
    kl: float | None = None
    agreement: float | None = None
    teacher_nats: float | None = None
    sequences: tuple[tuple[float, float], ...] = ()

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.nats, 700.0))


def lm_figures(
    chunks: Sequence[Any],
    dataset: Any,
    samples: int,
    vocab_size: int,
    *,
    batch_size: int,
    teacher: Sequence[Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LMFigures:
    """Run the first `samples` samples through the model, and through the teacher; every rank calls.

    Args:
        chunks, dataset, samples, progress: as for `lm_loss`.
        vocab_size: of both models, without padding.
        batch_size: samples in one forward pass of a rank.
        teacher: this rank's GPTModels of it, under the same layout, its output layer cut as the model's.
    """
    device = next(chunks[0].parameters()).device
    # By sample: loss, tokens, right ones, KL, agreements, the teacher's loss.
    sums = torch.zeros(6, samples, dtype=torch.float64, device=device)
    head = head_of(chunks, vocab_size)
    teachers = head_of(teacher, vocab_size) if teacher is not None else None
    mine = range(parallel.dp_rank(), samples, parallel.dp_size())
    with evaluating(chunks):
        for begin in range(0, len(mine), batch_size):
            numbers = list(mine[begin : begin + batch_size])
            batch = stacked([dataset[i] for i in numbers], device)
            hidden = final_hidden_states(chunks, batch)
            of_teacher = None if teacher is None else final_hidden_states(teacher, batch)
            if head is not None and hidden is not None:
                found = _sums(hidden, head, batch, of_teacher, teachers)
                sums[: len(found), numbers] = found
            if progress is not None:
                progress(begin + len(numbers))
    parallel.broadcast_pp(sums, parallel.pp_size() - 1)
    parallel.all_reduce(sums, "dp")
    return figures_of(sums.cpu(), teacher=teacher is not None)


def _sums(
    hidden: Tensor, head: Head, batch: dict[str, Tensor], of_teacher: Tensor | None, teachers: Head | None
) -> Tensor:
    """By sample, float64 [3 or 6, b]."""
    b, s = batch["labels"].shape
    labels, weight = batch["labels"].flatten(), batch["loss_mask"].flatten().double()
    own = hidden.transpose(0, 1).flatten(0, 1)
    scores = token_scores(own, head, labels)
    rows = [-scores.log_probs.double(), torch.ones_like(weight), (scores.best == labels).double()]
    if of_teacher is not None and teachers is not None:
        others = of_teacher.transpose(0, 1).flatten(0, 1)
        kl, agree = divergences(own, head, others, teachers)
        rows += [kl.double(), agree.double(), -token_scores(others, teachers, labels).log_probs.double()]
    return torch.stack([(row * weight).view(b, s).sum(1) for row in rows])


def figures_of(sums: Tensor, *, teacher: bool) -> LMFigures:
    """Of sums by sample, float64 [3, samples] (loss, tokens, right ones), or with a teacher [6, samples] (KL,
    agreements, its loss)."""
    totals, samples = sums.sum(1), sums.shape[1]
    tokens = float(totals[1])
    nats = float(totals[0]) / tokens
    # Of a ratio of sums over the sequences, by its linear approximation.
    residuals = sums[0] - nats * sums[1]
    scale = math.sqrt(samples / max(1, samples - 1)) / tokens
    kl, agreement, others = (float(total) / tokens for total in totals[3:]) if teacher else (None, None, None)
    return LMFigures(
        nats=nats,
        stderr=float(residuals.square().sum().sqrt()) * scale,
        accuracy=float(totals[2]) / tokens,
        tokens=int(tokens),
        samples=samples,
        kl=kl,
        agreement=agreement,
        teacher_nats=others,
        sequences=tuple(zip(sums[0].tolist(), sums[1].tolist(), strict=True)),
    )


def text_bytes(dataset: Any, samples: int, decode: Callable[[list[int]], str]) -> int:
    """UTF-8 bytes of the text that the scored labels of the first samples stand for; `decode` leaves out control
    tokens."""
    total = 0
    for number in range(samples):
        item = dataset[number]
        total += len(decode(item["labels"][item["loss_mask"] > 0].tolist()).encode())
    return total
