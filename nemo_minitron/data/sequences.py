"""The packed sequences that a training run will see, known before it starts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.data.chat.sequences import Conversations
from nemo_minitron.data.datasets import gpt_dataset
from nemo_minitron.data.prepare import PreparedData


@dataclass(frozen=True)
class Schedule:
    """How many sequences a run draws from a split, and how many it reads of them.

    NeMo's data module asks Megatron for `drawn` sequences, on which their order depends once that is more than an
    epoch; each validation reads the first `used` again. Source: nemo/collections/llm/gpt/data/pre_training.py@2.4.1.
    """

    drawn: int
    used: int


def schedules(
    max_steps: int, global_batch_size: int, val_check_interval: int, limit_val_batches: int
) -> dict[str, Schedule]:
    """The schedule of each split, of a run of `max_steps`; `val_check_interval` 0 is one validation at its end."""
    interval = min(val_check_interval or max_steps, max_steps)
    train, valid = max_steps * global_batch_size, limit_val_batches * global_batch_size
    return {"train": Schedule(train, train), "valid": Schedule((max_steps // interval + 1) * valid, valid)}


class SplitSequences:
    """The sequences of a split as the model sees them in training.

    Args:
        data: the indexed corpus.
        d: seq_length and seed of the order.
        split: "train" or "valid".
        drawn: see `Schedule`.
        conversations: what is learned from beside the corpus, or instead of it.
    """

    def __init__(
        self,
        data: PreparedData,
        d: DataConfig,
        split: str,
        drawn: int,
        conversations: Conversations | None = None,
    ) -> None:
        self.dataset: Any = gpt_dataset(
            data.indexed.paths(split), split, drawn, d.seq_length, d.seed, data.indexed.eod, data.index_cache
        )
        if conversations is not None:
            self.dataset = conversations.dataset(split, d, drawn, self.dataset)

    def tokens(self, number: int) -> Tensor:
        """Token ids int64 [s]."""
        tokens: Tensor = self.dataset[number]["tokens"]
        return tokens
