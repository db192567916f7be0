"""The difference of two models over the same items, and its standard error, which is smaller than that of two means."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.comparison.measured import JUDGED, TEXT, Evaluation, Key, Score

_SAME = 1e-6
_TWO_SIDED = 1.96  # of a normal distribution: 95 in 100 lie within


@dataclass(frozen=True)
class Difference:
    """`value`: a model's score less the baseline's, over `items`; or `why` there is none."""

    value: float | None = None
    stderr: float | None = None
    items: int = 0
    why: str | None = None

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside of its 95 % interval."""
        return (
            self.value is not None and self.stderr is not None and abs(self.value) > _TWO_SIDED * self.stderr
        )


def difference(baseline: Evaluation, other: Evaluation, score: Score) -> Difference:
    """Of one metric of a benchmark.

    Args:
        score: the other model's row; the baseline has one of the same name.
    """
    label = score.task
    first, second = (_values(run, label, score.metric) for run in (baseline, other))
    if not first or not second:
        return Difference(why="what each item scored was not kept")
    if not all(key[2] for key in [*first, *second]):  # of an earlier version, or a judge's: known by number
        first, second = _by_number(first), _by_number(second)
    if (why := _differ(set(first), set(second))) is not None:
        return Difference(why=why)
    if abs(statistics.fmean(second.values()) - score.value) > _SAME * max(1.0, abs(score.value)):
        return Difference(why="the score is no mean over items")
    return _mean([second[key] - first[key] for key in second])


def loss_difference(baseline: Evaluation, other: Evaluation) -> Difference:
    """Of the LM loss, in nats a token, over the same sequences of the same tokens."""
    first, second = baseline.items(TEXT), other.items(TEXT)
    try:
        pairs = [
            (float(a["nats"]), float(b["nats"]), float(a["tokens"]))
            for a, b in zip(first, second, strict=True)
        ]
        alike = [a["tokens"] for a in first] == [b["tokens"] for b in second]
    except (KeyError, TypeError, ValueError):
        return Difference(why="what each sequence lost was not kept, or they are others")
    if not pairs or not alike:
        return Difference(why="what each sequence lost was not kept, or they are others")
    tokens = sum(count for _, _, count in pairs)
    value = sum(b - a for a, b, _ in pairs) / tokens
    # Of a ratio of sums over the sequences, by its linear approximation.
    squares = sum((b - a - value * count) ** 2 for a, b, count in pairs)
    number = len(pairs)
    stderr = math.sqrt(squares * number / (number - 1)) / tokens if number > 1 else None
    return Difference(value, stderr, number)


def _mean(values: Sequence[float]) -> Difference:
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(statistics.fmean(values), stderr, len(values))


def _differ(first: set[Key], second: set[Key]) -> str | None:
    """Why two sets of items are not the same."""
    if len(first) != len(second):
        return f"{len(second)} items, {len(first)} of the baseline's"
    return None if first == second else "the items are others"


def _values(run: Evaluation, label: str, metric: str) -> dict[Key, float]:
    """What each item scored in one metric; empty where an item has no single number."""
    rows = run.items(label)
    if label == JUDGED:
        return _ratings(rows, metric)
    name, _, chosen = metric.partition(", ")
    found: dict[Key, float] = {}
    for row in rows:
        if row.get("filter", "none") != (chosen or "none"):
            continue
        value, number = row.get(name), row.get("item")
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(number, int):
            return {}
        sha256 = row.get("sha256")
        found[str(row.get("task")), number, sha256 if isinstance(sha256, str) else None] = float(value)
    return found


def _by_number(found: dict[Key, float]) -> dict[Key, float]:
    return {(task, number, None): value for (task, number, _), value in found.items()}


def _ratings(rows: list[dict[str, Any]], metric: str) -> dict[Key, float]:
    """MT-Bench's: the mean of a question's two turns, of one of them ("rating, turn 1"), or of one category."""
    part = metric.partition(", ")[2]
    turn = int(part[-1]) - 1 if part.startswith("turn ") else None
    found: dict[Key, float] = {}
    for row in rows:
        if turn is None and part and row.get("category") != part:
            continue
        ratings = row.get("ratings") or []
        kept = [r for i, r in enumerate(ratings) if r is not None and turn in (None, i)]
        if kept and all(isinstance(r, int | float) for r in kept):
            found[JUDGED, int(row["item"]), None] = statistics.fmean(kept)
    return found
