"""Which loss is meant."""

import math
from dataclasses import dataclass

from nemo_minitron.errors import InputError

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


@dataclass(frozen=True)
class LossSettings:
    """A distillation loss of one token: T^2 * D(p, q) + ce_weight * CE, in nats.

    p and q are the softmax of the teacher's and the student's logits / T over the shared true vocabulary; CE is the
    student's next-token cross-entropy at temperature 1 over the same vocabulary.

    Attributes:
        divergence: "forward_kl", KL(p || q) (arXiv 2407.14679, section 3: the one to use); "reverse_kl", KL(q || p);
            "jensen_shannon", beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
            (arXiv 2306.13649, section 2).
        beta: of "jensen_shannon", between 0 and 1, ends left out.
        temperature: T; the factor T^2 keeps gradients comparable (arXiv 1503.02531, section 2).
        top_k: look at the teacher's k most probable tokens only; None is the whole vocabulary.
        tail: with top_k, all other tokens together are one more outcome, on both sides; else p and q are each made to
            sum to 1 over the k tokens, and the loss says nothing of what the student gives to others.
        ce_weight: 0 leaves the cross-entropy out of the loss (it is still reported where labels are given).

    Raises:
        InputError: a value outside its range.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    tail: bool = True
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise InputError(f"divergence {self.divergence!r}: must be one of {', '.join(DIVERGENCES)}")
        if not 0 < self.beta < 1:
            raise InputError(f"beta {self.beta}: must be between 0 and 1, both left out")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature {self.temperature}: must be a finite number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k}: must be at least 1, or null for the whole vocabulary")
        if not (self.ce_weight >= 0 and math.isfinite(self.ce_weight)):
            raise InputError(f"ce_weight {self.ce_weight}: must be a finite number, 0 or above")
