"""The schema of `recipes/pipeline.py`; `config.parse` checks it."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.ranges import NamedValues, PathName
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class StepConfig:
    """One run of one recipe.

    `recipe`: its name. `preset`: what `+conf=` would choose; null: none. `choose`: files of groups, as `prune: depth`.
    `set`: its keys, nested. `on`: false leaves the step out.

    A value `@NAME` in `set` stands for the run directory of an earlier step, `@source` for the pipeline's source, and
    `@A|@B` for the first of them that is on.
    """

    recipe: str = MISSING
    preset: str | None = None
    choose: dict[str, str] = field(default_factory=dict)
    set: NamedValues = field(default_factory=dict)
    on: bool = True


@dataclass
class PipelineConfig:
    """`steps`: by name, in the order in which they run."""

    steps: dict[str, StepConfig] = field(default_factory=dict)


@dataclass
class PipelineRecipe(CommonConfig):
    """`recipes/pipeline.py`. `source`: the teacher, as of prune. What is typed of `data`, `trainer`, `eval` and `seed`
    goes to every step, before what the step itself sets.
    """

    source: PathName = MISSING
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
