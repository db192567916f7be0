"""The schema of `recipes/report.py`; `config.parse` checks it."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from nemo_minitron.config.ranges import PathName, Positive, Range
from nemo_minitron.config.recipes import CommonConfig


@dataclass
class ReportConfig:
    """What is on the page beside what lies in the runs.

    `runs`: further runs whose measurements are shown, of `recipes/evaluate.py` for instance. `samples`: to how many of
    `prompts` the teacher, the student before the last run and the student after it answer, greedily, in up to
    `max_new_tokens` tokens; 0 loads no model.
    """

    runs: list[str] = field(default_factory=list)
    samples: Annotated[int, Range(least=0, most=64)] = 0
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: Positive = 48


@dataclass
class ReportRecipe(CommonConfig):
    """`recipes/report.py`. `source`: a finished run; the runs before it are found by what it says."""

    source: PathName = MISSING
    report: ReportConfig = field(default_factory=ReportConfig)
