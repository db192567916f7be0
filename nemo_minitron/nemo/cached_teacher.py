"""A teacher that is read from its cache, where the student's last stage needs it."""

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.distillation.loss.losses import HiddenTeacher, TopKTeacher
from nemo_minitron.distillation.loss.settings import LossSettings
from nemo_minitron.distillation.loss.vocabulary import vocab_shard


class CachedTeacher:
    """Gives the loss its teacher for any microbatch; on the ranks of the last stage.

    Args:
        cache: has every sequence that will be asked for.
        settings: the loss.
        student_rows: v/tp, the rank's rows of the student's output layer: the teacher's are cut where they are.
        vocab_size: tokens that both models are compared on.
        device: of the student.
    """

    def __init__(
        self,
        cache: TeacherCache,
        settings: LossSettings,
        student_rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.cache, self.settings, self.device = cache, settings, device
        self._head: Tensor | None = None
        if cache.contents.form == "hidden":
            shard = vocab_shard(student_rows, vocab_size)
            self._head = cache.head(slice(shard.first, shard.first + shard.columns)).to(device)

    def target(self, tokens: Tensor) -> HiddenTeacher | TopKTeacher:
        """The teacher of sequences tokens [b, s]; of hidden states each tensor-parallel rank reads its part.

        Raises:
            InputError: a sequence is not in the cache.
        """
        if self._head is not None:
            return HiddenTeacher(
                self.cache.hidden(tokens, self._part(tokens.shape[1])).to(self.device), self._head
            )
        assert self.settings.top_k is not None
        found = self.cache.top_k(tokens, self.settings.top_k, self.settings.tail)
        tail = found.tail_logsumexp
        return TopKTeacher(
            found.values.to(self.device),
            found.indices.to(self.device),
            None if tail is None else tail.to(self.device),
        )

    def _part(self, length: int) -> slice:
        """As sequence parallelism cuts a sequence: the loss gathers the parts, whether the student is cut so or not."""
        if length % parallel.tp_size():
            return slice(0, length)
        part = length // parallel.tp_size()
        return slice(parallel.tp_rank() * part, (parallel.tp_rank() + 1) * part)
