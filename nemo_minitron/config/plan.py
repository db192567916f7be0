"""The schema of `recipes/plan_run.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from nemo_minitron.config.pipeline import PipelineConfig
from nemo_minitron.config.ranges import AboveZero, Choice, NotNegative, PathName, Positive, Range
from nemo_minitron.config.recipes import CommonConfig

HERE = "here"
GPUS = ("b200", "h200", "h100", "a100", "a100_40gb", "l40s", "l4", "rtx4090", "rtx3090")


@dataclass
class PlanConfig:
    """What a run may take, and which run.

    `recipe`: plan one run of it, with what is typed beside as its own settings; null: the steps of `pipeline`.

    `gpu`: a GPU by name, or "here": one process of this machine, whose speed is measured. `memory_gib` and `tflops` of
    a device, for one that is not in the list; null: the named one's. `nodes` of `gpus_per_node` each (null: 8; of
    "here" 1). `efficiency`: the share of the peak that a GPU's products reach, assumed. `network_gb_s`: from a GPU to
    one of another node. `price_per_hour` of a device; null: no cost is said. `layouts`: how many of those that fit are
    shown of each training.
    """

    recipe: str | None = None
    gpu: Annotated[str, Choice(*GPUS, HERE)] = "h100"
    memory_gib: AboveZero | None = None
    tflops: AboveZero | None = None
    nodes: Annotated[int, Range(least=1, most=10_000)] = 1
    gpus_per_node: Annotated[int, Range(least=1, most=64)] | None = None
    efficiency: Annotated[float, Range(above=0, most=1)] = 0.4
    network_gb_s: AboveZero = 50.0
    price_per_hour: NotNegative | None = None
    layouts: Positive = 5


@dataclass
class PlanRecipe(CommonConfig):
    """`recipes/plan_run.py`. `source`: the teacher, as of prune; a config.json, or a directory with nothing else, is
    enough. What else there is, `student`, `teacher`, `teacher_cache`, `sdg`, `stream`, `optim` and the groups,
    belongs to `plan.recipe`.
    """

    source: PathName = MISSING
    student: PathName | None = None
    teacher: PathName | None = None
    teacher_cache: PathName | None = None
    sdg: PathName | None = None
    stream: bool | None = None
    optim: Any = None
    plan: PlanConfig = field(default_factory=PlanConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: Any = None
    prune: Any = None
    search: Any = None
    distill: Any = None
    cache: Any = None
    synthesize: Any = None
    align: Any = None
