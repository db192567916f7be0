"""The schema of `recipes/evolve.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from nemo_minitron.config.merge import MergeRecipe
from nemo_minitron.config.ranges import AboveZero, Choice, PathName, Positive, Range


@dataclass
class EvolveConfig:
    """How a recipe of a merge is searched for, by CMA-ES (arXiv 2403.13187).

    `space`: "parameters" (the numbers of `merge.method`), "layers" (which layers of the models follow each other, and
    the scales between them) or "both" (parameters, then layers of the models and of what that found).

    `fitness`: what a candidate is measured by: "lm_loss" (nats a token of `samples` sequences of the train split),
    "task" (the share of wrong answers to the questions of `task_file`) or "benchmark" (1 minus the score of the first
    `samples` items of `benchmark`, a name as of `eval.tasks`). The result is measured on what the search has not seen:
    `eval.samples` sequences of the valid split, `held_out_file`, or the items after the first `samples`. `normalize`:
    of a task, by the tokens of a choice.

    `generations` of `population` candidates (null: 4 + floor(3 ln n) of n numbers); `sigma`: the first standard
    deviation of numbers that go from 0 to 1. `groups`: of layers, each with numbers of its own. `largest_weight`: what
    a weight goes up to.

    `repeats`: how often the layers of all models are laid out one after another. `scales`: of the state between layers:
    "none", "slots" (one for each place) or "pairs" (one for each layer that follows another), from 1 - `scale_range`
    to 1 + `scale_range`. `most_layers`: of a path; null: any.
    """

    space: Annotated[str, Choice("parameters", "layers", "both")] = "parameters"
    fitness: Annotated[str, Choice("lm_loss", "task", "benchmark")] = "lm_loss"
    samples: Positive = 64
    task_file: PathName | None = None
    held_out_file: PathName | None = None
    normalize: bool = False
    benchmark: str | None = None
    generations: Annotated[int, Range(least=1, most=1_000_000)] = 20
    population: Annotated[int, Range(least=2, most=100_000)] | None = None
    sigma: Annotated[float, Range(above=0, most=1)] = 1 / 6
    groups: Annotated[int, Range(least=1, most=1000)] = 1
    largest_weight: AboveZero = 1.0
    repeats: Annotated[int, Range(least=1, most=64)] = 1
    scales: Annotated[str, Choice("none", "slots", "pairs")] = "slots"
    scale_range: Annotated[float, Range(above=0, below=1)] = 0.5
    most_layers: Positive | None = None


@dataclass
class EvolveRecipe(MergeRecipe):
    """`recipes/evolve.py`. `models`, `base`, `format`, `to`, `license`, `merge`: as of merge; the numbers of `merge`
    are what the result is compared with. `data`: what "lm_loss" reads. `seed`: of the search too.
    """

    evolve: EvolveConfig = field(default_factory=EvolveConfig)
