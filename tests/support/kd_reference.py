"""Distillation losses in float64, one process, whole logits: what the package's losses are held against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def loss_sums(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    ce_weight: float = 0.0,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kd, ce) sums over tokens; logits [s, b, v] float64 without padding, mask and labels [b, s]."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    if top_k is not None:
        chosen = torch.zeros_like(teacher).scatter(-1, teacher.topk(top_k, dim=-1).indices, 1.0).bool()
        log_q, log_p = (_outcomes(t, chosen, tail) for t in (log_q, log_p))
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    elif divergence == "reverse_kl":
        kd = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    else:
        # Not the mixture's log: where both underflow to 0 it has none.
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        kd = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    kd = (temperature**2 * kd * mask.t()).sum()
    ce = kd.new_zeros(())
    if labels is not None:
        tokens = F.cross_entropy(student.flatten(0, 1), labels.t().flatten(), reduction="none")
        ce = (tokens * mask.t().flatten()).sum()
    return kd + ce_weight * ce, kd, ce


def _outcomes(log_probabilities: Tensor, chosen: Tensor, tail: bool) -> Tensor:
    s, b, _ = log_probabilities.shape
    kept = log_probabilities[chosen].view(s, b, -1)
    if not tail or kept.shape[-1] == chosen.shape[-1]:  # of the whole vocabulary nothing is left
        return kept.log_softmax(-1)
    rest = log_probabilities.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((kept, rest), dim=-1)
