"""The schema of the group `prune`; `config.parse` checks it."""

from dataclasses import dataclass
from typing import Annotated

from nemo_minitron.config.ranges import (
    Choice,
    Count,
    Layers,
    LayersOrLate,
    PathName,
    Positive,
    Seed,
    Size,
)

Statistic = Annotated[str, Choice("mean", "l2", "var")]


@dataclass
class PruneConfig:
    """What to keep and how to choose it. The sizes `hidden_size` (channels), `ffn_hidden_size` (MLP neurons),
    `num_attention_heads`, `num_query_groups` and `num_layers` are integers, fractions of the source ("3/4"), or null:
    left alone. `multiple_of`: what fractions of hidden_size and ffn_hidden_size are rounded to (256 for llama.cpp's K
    types); null: to tiles of matrix products.

    Layers: `num_layers` lets `layer_metric` choose, `contiguous` as one block of neighbours, never the first
    `protect_first` and the last `protect_last`; or `keep_layers` or `drop_layers` lists them, 0-based;
    `drop_layers=late` is the block right before the last layer. `layer_metric`: "block_influence" or "angular_distance"
    (one pass over the calibration samples for all layers), "lm_loss" (the loss with each layer or block left out, about
    half a pass for each), "task" (the accuracy lost on the questions in `task_file`, likewise).

    `importance` of width's units: by "activation" over `calibration_samples` sequences of the train split, reduced by
    `sequence_aggregation` along each and by `batch_aggregation` over them; or "random" by `seed`, the control.
    `include_final_norm`: whether the last norm counts for channels. `head_residual`: the queries of kept heads
    take in those of the pruned ones of their group (arXiv 2407.14679, section 2.2).

    `task_file`: a JSONL of multiple-choice questions (`evaluation.multiple_choice.load_task`); the accuracy before and
    after is measured too. `task_normalize`: compare choices by log-probability a token, not by the sum. `scores`: a
    scores.safetensors to use instead of scoring. `iterations`: in how many steps to score and prune. `control_seeds`:
    how many times the same sizes are also pruned at random, for comparison.
    """

    hidden_size: Size = None
    ffn_hidden_size: Size = None
    num_attention_heads: Size = None
    num_query_groups: Size = None
    num_layers: Size = None
    multiple_of: Positive | None = None
    keep_layers: Layers = None
    drop_layers: LayersOrLate = None
    layer_metric: str = "block_influence"  # or whatever prune.scores has
    task_file: PathName | None = None
    task_normalize: bool = False
    contiguous: bool = False
    protect_first: Count = 0
    protect_last: Count = 0
    importance: Annotated[str, Choice("activation", "random")] = "activation"
    seed: Seed = 0
    batch_aggregation: Statistic = "l2"
    sequence_aggregation: Statistic = "mean"
    include_final_norm: bool = True
    head_residual: bool = False
    calibration_samples: Positive = 128
    scores: PathName | None = None
    iterations: Positive = 1
    control_seeds: Count = 0
