"""The schema of `recipes/compare.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from nemo_minitron.config.ranges import PathName, Range
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class CompareConfig:
    """How models are put side by side.

    `names`: what they are called in the table, in the order of `models`; []: the last part of each path. `baseline`:
    the name or the path of the one that differences are taken from; null: the first. `speed`: whether decoding is
    timed: `rounds` times in turns, `new_tokens` after a prompt of `prompt_tokens`, on `threads` threads (of torch and
    llama.cpp alike). `published`: whether the figures of arXiv 2408.11796 follow, in a section of their own.
    """

    names: list[str] = field(default_factory=list)
    baseline: str | None = None
    speed: bool = True
    prompt_tokens: Annotated[int, Range(least=1, most=1_000_000)] = 128
    new_tokens: Annotated[int, Range(least=2, most=1_000_000)] = 64
    rounds: Annotated[int, Range(least=1, most=100)] = 3
    threads: Annotated[int, Range(least=1, most=1024)] = 1
    published: bool = True


@dataclass
class CompareRecipe(CommonConfig):
    """`recipes/compare.py`. `models`: what is compared, each a finished run of recipes/evaluate.py, whose scores are
    taken, or a model: a run directory, a NeMo 2 or Hugging Face directory (of any family that transformers opens) or a
    GGUF file, which is evaluated first, as `eval` and `data` say.
    """

    models: list[PathName] = field(default_factory=list)
    compare: CompareConfig = field(default_factory=CompareConfig)
