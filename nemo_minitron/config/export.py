"""The schema of `recipes/export.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import Choice, PathName, Range
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class ExportConfig:
    """How a checkpoint is written.

    `dtype`: of Hugging Face weights, "source", "float32", "bfloat16" or "float16". `shard_size`: of a file of them at
    most, in bytes or as "5GB". `verify_tokens`: of real text, over which what was written must give the Megatron
    model's logits.
    """

    dtype: Annotated[str, Choice("source", "float32", "bfloat16", "float16")] = "source"
    shard_size: str = "5GB"
    verify_tokens: Annotated[int, Range(least=2)] = 256


@dataclass
class ExportRecipe(CommonConfig):
    """`recipes/export.py`. `source`: a Hugging Face, NeMo 2 or run directory. `format`: "hf". `to`: what is written;
    null: in the run directory.
    """

    source: PathName = MISSING
    format: Annotated[str, Choice("hf")] = "hf"
    to: PathName | None = None
    export: ExportConfig = field(default_factory=ExportConfig)
