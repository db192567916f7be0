"""A finished run of recipes/evaluate.py as data: its scores, and what each item scored."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text

ITEMS, TEXT, JUDGED = "items", "held_out_text", "mt_bench_80"
# An item as it is told apart: its task, its number, its hash where the run kept one.
Key = tuple[str, int, str | None]


@dataclass(frozen=True)
class Score:
    """A row of a result: a metric of a benchmark. `shots`: solved examples before each question, None: the task's own;
    `chance`: what a guess scores; `main`: the metric that the task is known by."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    shots: int | None
    chance: float | None
    at_chance: bool
    main: bool

    @property
    def name(self) -> str:
        """As it stands in a table."""
        shots = "" if self.shots is None else f"@{self.shots}"
        return f"{self.task}{shots}, {self.metric}"


@dataclass(frozen=True)
class Evaluation:
    """One model's. `directory`: of the run; `result`: its result.json, which a user may have touched."""

    directory: Path
    result: dict[str, Any]
    scores: list[Score] = field(default_factory=list)

    def number(self, key: str) -> float | None:
        """A number of the result, None where there is none."""
        value = self.result.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def shown(self) -> list[Score]:
        """The main score of each benchmark that was asked, without those of a group's parts; with MT-Bench's
        categories."""
        files = {file.stem for file in (self.directory / ITEMS).glob("*.jsonl")}
        return [s for s in self.scores if s.task in files and (s.main or s.task == JUDGED)]

    def items(self, label: str) -> list[dict[str, Any]]:
        """What each item of a benchmark scored; empty where that was not kept."""
        try:
            text = read_text(self.directory / ITEMS / f"{label}.jsonl", 1 << 30)
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (OSError, ValueError, RecursionError):
            return []
        return [row for row in rows if isinstance(row, dict)]


def read_evaluation(directory: Path, where: str) -> Evaluation:
    """A run's result.

    Args:
        where: how the user named it.

    Raises:
        InputError: its result.json is none of recipes/evaluate.py, or is damaged.
    """
    try:
        result = json.loads(read_text(directory / RESULT))
        if not isinstance(result, dict) or result.get("recipe") != "evaluate":
            raise ValueError("it is no result of recipes/evaluate.py")
        scores = [_score(row) for row in result.get("scores") or ()]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{where}: {RESULT} cannot be read ({error})") from None
    return Evaluation(directory, result, scores)


def _score(row: dict[str, Any]) -> Score:
    return Score(
        task=str(row["task"]),
        metric=str(row["metric"]),
        value=float(row["score"]),
        stderr=_or_none(row["stderr"]),
        items=int(row["items"]),
        shots=None if row["shots"] is None else int(row["shots"]),
        chance=_or_none(row["chance"]),
        at_chance=bool(row["at_chance"]),
        main=bool(row["main"]),
    )


def _or_none(value: Any) -> float | None:
    return None if value is None else float(value)
