"""Distillation: losses that never hold the logits of all tokens."""

from nemo_minitron.distillation.loss.losses import HiddenTeacher, LossSums, TopKTeacher, distillation_loss
from nemo_minitron.distillation.loss.on_logits import loss_on_logits
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.vocabulary import align_head, shared_vocab_size

__all__ = [
    "HiddenTeacher",
    "LossSettings",
    "LossSums",
    "TopKTeacher",
    "align_head",
    "distillation_loss",
    "loss_on_logits",
    "shared_vocab_size",
]
