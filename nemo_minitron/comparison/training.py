"""Tokens that the runs behind a model trained on, and what that cost."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError
from nemo_minitron.export.lineage import Step, lineage

_COUNTED = ("pretrain", "correct_teacher", "distill")
_UNCOUNTED = ("sft", "preference")
# A backward pass costs twice a forward pass.
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Training:
    """Over the runs since the base model, as far as they say.

    Attributes:
        tokens: None where no run trained, or none says on how many.
        flops: of forward and backward passes of the student, and forward passes of the teacher; None: a run lacks what
            they are counted of.
        left_out: recipes of runs that do not say how many tokens they saw.
        recipes: of all runs, first to last.
    """

    tokens: int | None = None
    flops: float | None = None
    left_out: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)


def training_of(source: str | Path, data: DataConfig) -> Training:
    """What a model's chain of runs says.

    Args:
        source: a run, or any other checkpoint, which has none.
        data: says where the cache is.
    """
    steps = _since_random_weights(lineage(source).steps)
    trained = [step for step in steps if step.result.get("recipe") in _COUNTED]
    counts = [_positive(step.result.get("tokens")) for step in trained]
    known = [count for count in counts if count is not None]
    costs = [_flops(step, data) for step in trained]
    left_out = [str(step.result.get("recipe")) for step in steps if step.result.get("recipe") in _UNCOUNTED]
    return Training(
        tokens=sum(known) if known else None,
        flops=sum(cost for cost in costs if cost is not None) if trained and None not in costs else None,
        left_out=left_out[::-1],
        recipes=[str(step.result.get("recipe", "run")) for step in reversed(steps)],
    )


def _since_random_weights(steps: list[Step]) -> list[Step]:
    """A model that was trained from scratch in the sizes of another has nothing of that one's training."""
    for number, step in enumerate(steps, 1):
        if step.result.get("from_scratch") is True:
            return steps[:number]
    return steps


def _flops(step: Step, data: DataConfig) -> float | None:
    tokens, length = _positive(step.result.get("tokens")), _seq_length(step)
    student = _architecture(step.directory, data)
    if tokens is None or length is None or student is None:
        return None
    each = float(_FORWARD_AND_BACKWARD * student.flops_per_token(length))
    if step.result.get("recipe") == "distill" and isinstance(named := step.result.get("teacher"), str):
        teacher = _architecture(Path(named), data)
        if teacher is None:
            return None
        each += teacher.flops_per_token(length)
    return each * tokens


def _architecture(path: Path, data: DataConfig) -> Architecture | None:
    try:
        return find_source(path, data=data).architecture
    except (InputError, OSError):
        return None


def _seq_length(step: Step) -> int | None:
    """Of the run's configuration, which is data like any other."""
    try:
        found: Any = yaml.safe_load(step.configuration)
        return _positive(found["data"]["seq_length"])
    except (yaml.YAMLError, TypeError, LookupError, RecursionError, ValueError):
        return None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
