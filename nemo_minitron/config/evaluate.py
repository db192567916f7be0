"""The schema of `recipes/evaluate.py`; `config.parse` checks it."""

from dataclasses import dataclass

from omegaconf import MISSING

from nemo_minitron.config.ranges import PathName
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class EvaluateRecipe(CommonConfig):
    """`recipes/evaluate.py`. `source`: a run directory, a NeMo 2 or Hugging Face directory, or a GGUF file. `teacher`:
    likewise, to compare with on the held-out text; null: none.
    """

    source: PathName = MISSING
    teacher: PathName | None = None
