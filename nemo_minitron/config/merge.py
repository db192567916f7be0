"""The schema of `recipes/merge.py`; `config.parse` checks it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from nemo_minitron.config.ranges import Choice, Kind, PathName, Range
from nemo_minitron.config.recipes import CommonConfig

_MOST_VALUES = 10_000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_layer(value: Any) -> bool:
    several = isinstance(value, list) and 0 < len(value) <= _MOST_VALUES and all(map(_is_number, value))
    return several or _is_number(value)


def _by_model(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and bool(value) and all(map(_by_layer, value)))


ByModel = Annotated[
    Any,
    Kind("a finite number, or a list with one a model: a number, or a list of numbers by layer", _by_model),
]
ByLayer = Annotated[Any, Kind("a finite number, or a list of them by layer", _by_layer)]
Method = Annotated[
    str, Choice("linear", "task_arithmetic", "slerp", "ties", "dare_ties", "model_stock", "path")
]


@dataclass
class MergeConfig:
    """How models become one.

    `method`: "linear" (the weighted mean of the models), "task_arithmetic" (the base and the weighted sum of the
    models' differences to it), "ties" (the same of the largest values of each difference, as far as they agree in their
    sign), "dare_ties" (of values drawn at random), "model_stock" (between the base and the mean, by the angles between
    the differences), "slerp" (between two models on the sphere) or "path" (layers of the models in sequence).
    `weight`: of each model. `density`: the share of a difference's values that is kept, in 0 .. 1. `t`: of slerp, 0 is
    the first model and 1 the second. A list in the place of a model's number is spread over the layers: `spread` is
    "gradient" (on straight lines, as mergekit does it) or "steps" (each value for as many layers).

    `normalize`: divide by the weights; null: linear and ties do. `rescale`: what a thinned difference is scaled by:
    "none", "density" (1 / density, as in DARE's paper) or "l1" (so that its sum of magnitudes stays); null: dare_ties
    by "l1", as mergekit does it. `scale`: factor of what is added to the base. `filter_wise`: model_stock's angles by
    row.

    `dtype`: of what is written; "source": as the base, or the first model, has it. `tokenizer`: the model whose
    tokenizer and chat template the result has; null: the base, or the first. `shard_size`: of a file of weights.
    `file`: a YAML file of mergekit, which then says all of this, and `models` and `base`. `path`: the way through the
    layers, such as "0:0-7,1:4-7*0.9": layers 0 to 7 of the first model, then 4 to 7 of the second, whose first gets 0.9
    times the state; embeddings and output layer are those of the first model.
    """

    method: Method = "linear"
    weight: ByModel = 1.0
    density: ByModel = 1.0
    t: ByLayer = 0.5
    spread: Annotated[str, Choice("gradient", "steps")] = "gradient"
    normalize: bool | None = None
    rescale: Annotated[str, Choice("none", "density", "l1")] | None = None
    scale: Annotated[float, Range(least=-1000, most=1000)] = 1.0
    filter_wise: bool = False
    dtype: Annotated[str, Choice("source", "float32", "bfloat16", "float16")] = "source"
    tokenizer: PathName | None = None
    shard_size: str = "5GB"
    file: PathName | None = None
    path: str | None = None


@dataclass
class MergeRecipe(CommonConfig):
    """`recipes/merge.py`. `models`: run, NeMo 2 or Hugging Face directories or GGUF files, of one architecture and
    tokenizer. `base`: what they were trained from, for the methods that need it. `format`: "hf", a directory for
    transformers, or "nemo", a NeMo 2 directory. `to`: where it goes; null: `checkpoint/` in the run directory.
    `license`: by the hub's name; null: as the models say, where they agree; "none": of one's own. `seed`: of the values
    that dare_ties draws.
    """

    models: list[str] = field(default_factory=list)
    base: PathName | None = None
    format: Annotated[str, Choice("hf", "nemo")] = "hf"
    to: PathName | None = None
    license: str | None = None
    merge: MergeConfig = field(default_factory=MergeConfig)
