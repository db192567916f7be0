"""The schema of `search`: candidates for recipes/search.py."""

from dataclasses import dataclass
from typing import Annotated

from nemo_minitron.config.ranges import Choice, Count, NamedChoices, NamedValues, Positive, Range


@dataclass
class SearchConfig:
    """Candidates for `recipes/search.py`: the points of `grid` inside `budget`.

    `budget`: upper limits by metric (`parameters`, `non_embedding_parameters`, `flops_per_token`, `memory_bytes`), each
    a number or a fraction of the source's ("1/2" or 0.5); `slack`: the share of it that a candidate may leave unused.
    `context`
    tokens, `sequences` and `bytes_per_value` are what FLOPs and memory are counted for. `grid`: choices by axis, sizes
    or fractions ("1/1" is the source's size). `method`: `grid` tries the `max_candidates` that use most of the budget,
    `optuna` the `trials` that its sampler asks for. `distill_steps`: steps of `distill` that each candidate learns from
    the source before it is ranked (arXiv 2407.14679: 400); 0 ranks by the loss right after pruning.
    `distill_candidates`: only so many, the best after pruning; null: all.
    """

    budget: NamedValues = None
    slack: Annotated[float, Range(above=0, most=1)] = 0.05
    context: Positive = 4096
    sequences: Positive = 1
    bytes_per_value: Annotated[int, Range(least=1, most=8)] = 2
    grid: NamedChoices = None
    method: Annotated[str, Choice("grid", "optuna")] = "grid"
    max_candidates: Positive = 20
    trials: Positive = 20
    distill_steps: Count = 0
    distill_candidates: Positive | None = None
