"""Running a benchmark by lm-evaluation-harness, and what its results say: a row a metric, a row an item."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nemo_minitron.evaluation.benchmarks.catalogue import Benchmark

# What a task is known by, where it has several.
_MAIN = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
_NEVER_NORMALISED = ("mmlu", "winogrande", "truthfulqa")
_BOOTSTRAP = 1000
_NO_PROCESSES = "DISABLE_MULTIPROC"
# Of a normal distribution: 95 in 100 lie within.
_TWO_SIDED = 1.96


@dataclass(frozen=True)
class Row:
    """A score. `stderr`: its standard error over the `items`; `chance`: what a guess scores, None where nothing can be
    guessed; `main`: the metric that the task is known by."""

    task: str
    metric: str
    score: float
    stderr: float | None
    items: int
    shots: int | None
    chance: float | None
    main: bool = False

    @property
    def at_chance(self) -> bool:
        """Whether it cannot be told from a guess."""
        return self.chance is not None and self.score - _TWO_SIDED * (self.stderr or 0.0) <= self.chance

    def to_config(self) -> dict[str, Any]:
        """For result.json."""
        return {**asdict(self), "at_chance": self.at_chance}


@dataclass(frozen=True)
class Settings:
    """How questions are put. `limit`: the first items only; `chat`: as messages; `max_new_tokens`: of an answer."""

    limit: int | None
    chat: bool
    max_new_tokens: int | None


def language_models() -> tuple[Any, Any]:
    """`ShardedLM` and `BackendLM`, which are classes derived from lm_eval's."""
    from nemo_minitron.evaluation.benchmarks import adapter, backend  # import lm_eval

    return adapter.ShardedLM, backend.BackendLM


def run(lm: Any, benchmark: Benchmark, settings: Settings) -> tuple[list[Row], list[dict[str, Any]]]:
    """Ask, and score.

    Returns:
        The rows (of a group also its parts'), and what each item scored.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    wanted = benchmark.wanted
    with _quiet():
        found = evaluator.simple_evaluate(
            model=lm,
            tasks=[benchmark.task],
            num_fewshot=wanted.shots,
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            gen_kwargs=None if settings.max_new_tokens is None else {"max_gen_toks": settings.max_new_tokens},
            task_manager=TaskManager(include_defaults=False),
        )
    assert found is not None
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    rows = []
    for name, values in found["results"].items():
        parts = [samples[name]] if name in samples else [*samples.values()]
        rows += _rows(name, values, [item for part in parts for item in part], wanted.shots)
    rows.sort(key=lambda row: row.task != wanted.label)
    return _with_main(rows), [_item(name, item) for name, items in samples.items() for item in items]


def _rows(name: str, values: dict[str, Any], items: list[dict[str, Any]], shots: int | None) -> list[Row]:
    """Of the harness's `metric,filter` and `metric_stderr,filter`."""
    filters = {item["filter"] for item in items}
    count = len(items) // max(1, len(filters))
    rows = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        if error is None:
            error = _error_of_parts([item[metric] for item in items if metric in item])
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        chance = _chance(items) if metric in ("acc", "acc_norm") and "mc2" not in name else None
        rows.append(Row(name, shown, float(value), error, count, shots, chance))
    return rows


def _error_of_parts(parts: list[Any]) -> float | None:
    """Of a share over all parts of all items (instructions of prompts), items drawn; by its linear approximation."""
    if len(parts) < 2 or not all(isinstance(part, list) for part in parts):
        return None
    kept, every = [sum(part) for part in parts], [len(part) for part in parts]
    share = sum(kept) / sum(every)
    squares = sum((k - share * n) ** 2 for k, n in zip(kept, every, strict=True))
    return math.sqrt(squares * len(parts) / (len(parts) - 1)) / sum(every)


def _chance(items: list[dict[str, Any]]) -> float | None:
    """Of questions with given answers, one request each."""
    shares = [1 / len(item["arguments"]) for item in items if len(item["arguments"]) > 1]
    return sum(shares) / len(shares) if len(shares) == len(items) and shares else None


def _with_main(rows: list[Row]) -> list[Row]:
    mains: dict[str, tuple[int, str]] = {}
    for row in rows:
        names = _MAIN[1:] if row.task.startswith(_NEVER_NORMALISED) else _MAIN
        rank = next((n for n, name in enumerate(names) if row.metric.split(",")[0] == name), len(names))
        mains.setdefault(row.task, (rank, row.metric))
        mains[row.task] = min(mains[row.task], (rank, row.metric), key=lambda found: found[0])
    return [Row(**{**asdict(row), "main": mains[row.task][1] == row.metric}) for row in rows]


def _item(task: str, item: dict[str, Any]) -> dict[str, Any]:
    """What to write down of an item: its number, its hash, its answers and what they score."""
    answers = item["filtered_resps"]
    scores = {name: item[name] for name in item["metrics"]}
    numbered = {"task": task, "item": item["doc_id"], "sha256": item["doc_hash"], "filter": item["filter"]}
    return {**numbered, **scores, "answers": answers}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness prints, its own progress bars above all: there is one, the recipe's, and that one was
    made before. No processes for the bootstrap: they would be copies of one that holds a model."""
    before = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.pop(_NO_PROCESSES)
        if before is not None:
            os.environ[_NO_PROCESSES] = before
