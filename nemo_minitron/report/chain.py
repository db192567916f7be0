"""The runs that a page is about: the one that was named, those before it, its teacher's, and evaluations beside it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.export.lineage import Step, lineage
from nemo_minitron.files import read_text

# Recipes that measure a model and change none.
MEASURED = ("evaluate", "evaluate_instruct", "compare", "chat", "export", "report")
_MOST_SAMPLES = 8
_MOST_STEPS = 4000


@dataclass(frozen=True)
class Run:
    """A run directory, as untrusted data.

    Attributes:
        result: of result.json; `steps`: of steps.jsonl; `samples`: of samples.jsonl.
        measures: it only measures.
    """

    directory: Path
    result: dict[str, Any]
    command: str
    configuration: str
    steps: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def recipe(self) -> str:
        """Its name, as the result says it."""
        return str(self.result.get("recipe", "run"))

    @property
    def measures(self) -> bool:
        """Whether it only measures."""
        return self.recipe in MEASURED

    def number(self, key: str) -> float | None:
        """A finite number of the result; None where there is none."""
        return finite(self.result.get(key))


@dataclass(frozen=True)
class Chain:
    """Runs in the order in which they were made, the runs that made the teacher, and what they began with."""

    runs: list[Run]
    teacher: list[Run]
    measured: list[Run]
    base: str | None


def read_chain(source: str | Path, beside: Sequence[str | Path] = ()) -> Chain:
    """Follow a run's `student` and `source` backwards.

    Args:
        source: a finished run's directory, or the checkpoint in one.
        beside: further runs, evaluations for instance.

    Raises:
        InputError: no finished run is there.
    """
    found = _runs(source, "source")
    runs = [run for run in found if not run.measures]
    others = [_runs(path, "report.runs")[-1] for path in beside]
    teachers = [str(run.result["teacher"]) for run in runs if isinstance(run.result.get("teacher"), str)]
    known = {run.directory for run in runs}
    made = [run for run in (_before(teachers[0]) if teachers else []) if run.directory not in known]
    came_from = lineage(source).base
    base = None if came_from is None else str(came_from)
    return Chain(runs, made, [*(r for r in found if r.measures), *others], base)


def _runs(source: str | Path, setting: str) -> list[Run]:
    found = _before(source)
    if not found:
        raise InputError(
            f"{setting}={source}: no finished run; must be a directory with the result.json of a recipe"
        )
    return found


def _before(source: str | Path) -> list[Run]:
    return [_read(step) for step in reversed(lineage(source).steps)]


def _read(step: Step) -> Run:
    return Run(
        step.directory.resolve(),
        step.result,
        step.command,
        step.configuration,
        _thinned(_lines(step.directory / "steps.jsonl")),
        _lines(step.directory / "samples.jsonl"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, up to the first line that is none; empty where it cannot be read."""
    try:
        text = read_text(path)
    except (OSError, ValueError):
        return []
    found = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A picture has no room for more."""
    every = -(-len(steps) // _MOST_STEPS) if steps else 1
    return [entry for n, entry in enumerate(steps) if n % every == 0 or entry.get("split") != "train"]


def curve(steps: Sequence[dict[str, Any]], split: str, key: str) -> tuple[list[float], list[float]]:
    """Steps, and the finite values of one key at them."""
    points = [(finite(e.get("step")), finite(e.get(key))) for e in steps if e.get("split") == split]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def finite(value: Any) -> float | None:
    """A number of JSON, or None: for text, for true, for what float64 cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def answers(run: Run) -> list[dict[str, str]]:
    """Held-out prompts with the answers before the first step and after the last: prompt, before, after, reference."""
    at = [finite(row.get("step")) for row in run.samples]
    steps = [step for step in at if step is not None]
    if not steps or min(steps) == max(steps):
        return []
    first, last = (
        [row for row, step in zip(run.samples, at, strict=True) if step == edge]
        for edge in (min(steps), max(steps))
    )
    after = {str(row.get("prompt")): str(row.get("answer", "")) for row in last}
    return [
        {
            "prompt": str(row.get("prompt")),
            "before": str(row.get("answer", "")),
            "after": after[str(row.get("prompt"))],
            "reference": str(row.get("reference", "")),
        }
        for row in first
        if str(row.get("prompt")) in after
    ][:_MOST_SAMPLES]
