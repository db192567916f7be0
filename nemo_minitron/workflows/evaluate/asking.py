"""One benchmark after the other, on the rank that asks: rows, items, one bar."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.config.evaluate import EvaluateRecipe
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.evaluation.benchmarks import harness, judged
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.benchmarks.catalogue import Benchmark
from nemo_minitron.evaluation.benchmarks.harness import Row
from nemo_minitron.files import write_text
from nemo_minitron.progress import end_if_asked, open_bar
from nemo_minitron.workflows.evaluate.check import Prepared, chat_of

ITEMS, JUDGEMENTS = "items", "judgements.jsonl"


class Asking:
    """The benchmarks of a run. Answers are in the cache, and what each item scored in RUN/items/, as soon as they are
    known.

    Args:
        opened: the harness's language model, of known answers and of who is told how many requests there are, and how
            many are answered: `ShardedLM` or `BackendLM`.
    """

    def __init__(
        self,
        r: EvaluateRecipe,
        prepared: Prepared,
        directory: Path,
        opened: Callable[[Answers, Callable[[int], object], Callable[[int], object]], Any],
    ) -> None:
        self.r, self.directory, self.begin = r, directory, time.monotonic()
        # Of these weights in this precision.
        name = f"{prepared.source_sha256[:32]}-{r.trainer.precision}.jsonl"
        self.answers = Answers(cache_dir(r.data, "answers") / name if r.eval.cache else None)
        self.bar = open_bar("", 0, "request")
        self.lm = opened(self.answers, self._more, self._answered)
        self.rows: list[Row] = []
        self.judged: tuple[list[judged.Question], dict[int, list[str]]] | None = None

    def _more(self, count: int) -> None:
        self.bar.total += count
        self.bar.refresh()

    def _answered(self, count: int) -> None:
        end_if_asked()
        self.bar.update(count)

    def ask(self, benchmark: Benchmark) -> None:
        """All of its items, or the first ones."""
        e, wanted = self.r.eval, benchmark.wanted
        limit = (e.limits or {}).get(wanted.label, e.limit)
        tokens = (e.new_tokens or {}).get(wanted.label, e.max_new_tokens)
        self.bar.set_description_str(wanted.label)
        if wanted.judged:
            questions = benchmark.task[:limit]
            new = tokens or judged.MAX_NEW_TOKENS
            self.judged = questions, judged.answered(questions, lambda talks: self.lm.answer(talks, new))
            return
        how = harness.Settings(limit, chat_of(self.r, wanted), tokens)
        rows, items = harness.run(self.lm, benchmark, how)
        self._keep(wanted.label, items)
        self.rows += rows

    def fields(self) -> dict[str, Any]:
        """Of `result.json`, after the judge was asked; each row is also printed."""
        self.bar.close()
        unscored = self._rated() if self.judged is not None else []
        for row in self.rows:
            print(_line(row), flush=True)
        if unscored:
            print(
                f"{judged.NAME}: {len(unscored)} ratings are missing: {unscored[0]['why']}", file=sys.stderr
            )
        return {
            "scores": [row.to_config() for row in self.rows],
            "unscored": unscored,
            "requests": self.bar.n,
            "requests_known_before": self.answers.before,
            "questions_cut": self.lm.cut,
            "benchmarks_s": round(time.monotonic() - self.begin, 2),
            "limit": self.r.eval.limit,
            "limits": dict(self.r.eval.limits or {}),
        }

    def _rated(self) -> list[dict[str, Any]]:
        assert self.judged is not None
        questions, answers = self.judged
        judge = self.r.eval.judge
        key = os.environ.get(judge.key_variable)
        file = self.directory / JUDGEMENTS
        ratings = judged.rated(questions, answers, judge, key, self.r.data, file)
        for name, (mean, error, count) in judged.means(questions, ratings).items():
            self.rows.append(Row(judged.NAME, name, mean, error, count, None, None, name == "rating"))
        items = [
            {
                "item": q.number,
                "category": q.category,
                "answers": answers[q.number],
                "ratings": [ratings.found.get((q.number, turn)) for turn in range(2)],
            }
            for q in questions
        ]
        self._keep(judged.NAME, items)
        return [
            {"task": judged.NAME, "item": number, "turn": turn + 1, "why": why}
            for (number, turn), why in sorted(ratings.unscored.items())
        ]

    def _keep(self, label: str, items: list[dict[str, Any]]) -> None:
        write_items(self.directory, label, items)


def write_items(directory: Path, label: str, items: Iterable[dict[str, Any]]) -> None:
    """What each item of a benchmark scored: RUN/items/LABEL.jsonl."""
    file = directory / ITEMS / f"{label}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items))


def _line(row: Row) -> str:
    error = "" if row.stderr is None else f" ± {row.stderr:.3f}"
    chance = f" (chance {row.chance:.3f}{'; AT CHANCE' if row.at_chance else ''})" if row.chance else ""
    return f"{row.task}: {row.metric} {row.score:.3f}{error} of {row.items:,} items{chance}"
