"""What the alignment recipes hand from their checks to their runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.chat.encoded import EncodedSplit
from nemo_minitron.data.prepare import PreparedData

STEPS = "steps.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded; the student is of kind "nemo".

    `tokenizer`: a Hugging Face directory with the chat template. `corpus`: of the LM loss. `max_epochs`: those that are
    begun.
    """

    student: Source
    tokenizer: Path
    corpus: PreparedData
    train: EncodedSplit
    valid: EncodedSplit
    trainer: TrainerConfig
    max_epochs: int

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "student": str(self.student.path),
            "tokenizer": str(self.tokenizer),
            "corpus": self.corpus.to_config(),
            "train": self.train.to_config(),
            "valid": self.valid.to_config(),
        }


def has_cuda() -> bool:
    """Whether the run is on GPUs."""
    import torch

    return torch.cuda.is_available()
