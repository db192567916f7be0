"""IFEval and IFBench: instructions that a program can check, their items and checkers out of packages."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.evaluation.benchmarks.items import rows, written
from nemo_minitron.evaluation.benchmarks.packages import CHECKERS, INSTRUCTIONS, SENTENCES, opened

_FILES = {"ifeval": "ifeval/data/input_data.jsonl", "ifbench": "ifbench/data/IFBench_test.jsonl"}
# Asks NLTK for a tagger of parts of speech, which no package brings: 6 of IFBench's 300 items.
_NEEDS_TAGGER = "words:start_verb"
_MODES = ("strict", "loose")


@dataclass(frozen=True)
class Sample:
    """An item as the checkers take it."""

    key: str
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


def config(benchmark: str, data: DataConfig) -> dict[str, Any]:
    """The harness's task.

    Args:
        benchmark: "ifeval" or "ifbench".

    Raises:
        InputError: the packages were not fetched.
    """
    file = opened(INSTRUCTIONS, data) / "eval_framework/tasks" / _FILES[benchmark]
    items = [
        {
            "key": str(row["key"]),
            "prompt": row["prompt"],
            "ids": row["instruction_id_list"],
            # As text: a table of all items would give each the others' keys.
            "kwargs": json.dumps(row["kwargs"]),
        }
        for row in rows(file, "key", "prompt", "instruction_id_list", "kwargs")
        if _NEEDS_TAGGER not in row["instruction_id_list"]
    ]
    metrics = [
        {"metric": f"{level}_level_{mode}_acc", "aggregation": how, "higher_is_better": True}
        for level, how in (("prompt", "mean"), ("inst", _over_instructions))
        for mode in _MODES
    ]
    return written(items, 1280, checker(benchmark, data), metrics)


def _over_instructions(answers: list[list[bool]]) -> float:
    """The share of all instructions of all prompts."""
    kept = [followed for answer in answers for followed in answer]
    return sum(kept) / len(kept)


def checker(benchmark: str, data: DataConfig) -> Callable[[dict[str, Any], str], dict[str, Any]]:
    """What says whether an answer follows its item's instructions: all of a prompt, and each.

    Source: if-verifiable@0.1.2.
    """
    root, sentences = opened(CHECKERS, data), opened(SENTENCES, data)
    evaluate = _evaluate(root, sentences / "llama_index/core/_static/nltk_cache")

    def check(item: dict[str, Any], answer: str) -> dict[str, Any]:
        sample = Sample(item["key"], item["prompt"], item["ids"], json.loads(item["kwargs"]))
        results, _ = evaluate(benchmark, sample, answer)
        found: dict[str, Any] = {}
        for mode in _MODES:
            kept = [bool(getattr(result, f"{mode}_pass")) for result in results]
            # An empty answer has no results, and follows nothing.
            kept += [False] * (len(item["ids"]) - len(kept))
            found |= {f"prompt_level_{mode}_acc": float(all(kept)), f"inst_level_{mode}_acc": kept}
        return found

    return check


def _evaluate(root: Path, sentences: Path) -> Callable[..., Any]:
    """The package's own function; it asks NLTK's hub for data at import, which is here already."""
    # A new process, as MBPP's, and NLTK itself read it.
    os.environ["NLTK_DATA"] = str(sentences)
    import nltk

    if str(sentences) not in nltk.data.path:
        nltk.data.path.insert(0, str(sentences))
    ask, nltk.download = nltk.download, lambda *_, **__: False
    sys.path.insert(0, str(root))
    try:
        package = importlib.import_module("if_verifiable")
        importlib.import_module("if_verifiable.ifbench.instructions_registry")
        return package.evaluate_output_for_sample
    finally:
        sys.path.remove(str(root))
        nltk.download = ask
