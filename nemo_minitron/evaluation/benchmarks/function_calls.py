"""BFCL's single-turn Python categories: is a call written as it should be? Items and checker out of a package.

Its prompt for models without a tool format is put before the question, in the same message; an answer is taken apart
and compared by the package's own code, which parses and runs nothing.

Source: bfcl-eval@2026.3.23 (`model_handler/utils.py`, `eval_checker/ast_eval/ast_checker.py`).
"""

import contextlib
import copy
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_minitron import scratch
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.evaluation.benchmarks.items import rows, written
from nemo_minitron.evaluation.benchmarks.packages import FUNCTION_CALLS, opened

_NAME = "minitron"
# What importing the checker would bring: clients of every vendor's service, parsers of Java and JavaScript, and what
# those need. None of it is called here; `(module, names)`.
_LEFT_OUT = (
    ("bfcl_eval.constants.model_config", ("MODEL_CONFIG_MAPPING",)),
    ("bfcl_eval.model_handler.parser.java_parser", ("parse_java_function_call",)),
    ("bfcl_eval.model_handler.parser.js_parser", ("parse_javascript_function_call",)),
    (
        "tenacity",
        ("retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential"),
    ),
)


@dataclass(frozen=True)
class Checker:
    """`prompt(item)`: the one message; `valid(item, answer)`: whether the calls are right."""

    prompt: Callable[[dict[str, Any]], str]
    valid: Callable[[dict[str, Any], str], bool]


def config(category: str, data: DataConfig) -> dict[str, Any]:
    """The harness's task.

    Args:
        category: such as "simple_python", "parallel_multiple".

    Raises:
        InputError: the package was not fetched.
    """
    root = opened(FUNCTION_CALLS, data)
    directory, name = root / "bfcl_eval/data", f"BFCL_v4_{category}.json"
    right = {
        row["id"]: row["ground_truth"]
        for row in rows(directory / "possible_answer" / name, "id", "ground_truth")
    }
    found = [
        {**row, "ground_truth": right[row["id"]]}
        for row in rows(directory / name, "id", "question", "function")
    ]
    check = checker(root, category)
    # As text: a table of all items would give each the others' keys.
    items = [{"prompt": check.prompt(item), "item": json.dumps(item)} for item in found]
    return written(
        items,
        256,
        lambda row, answer: {"calls_right": float(check.valid(json.loads(row["item"]), answer))},
        [{"metric": "calls_right", "aggregation": "mean", "higher_is_better": True}],
    )


def checker(root: Path, category: str) -> Checker:
    """The package's own functions for a category."""
    with _importable(root):
        utils = importlib.import_module("bfcl_eval.model_handler.utils")
        ast_checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def prompt(item: dict[str, Any]) -> str:
        (turn,) = copy.deepcopy(item["question"])
        messages = utils.system_prompt_pre_processing_chat_model(
            turn, copy.deepcopy(item["function"]), item["id"]
        )
        (message,) = utils.combine_consecutive_user_prompts(
            utils.convert_system_prompt_into_user_prompt(messages)
        )
        return message["content"]

    def valid(item: dict[str, Any], answer: str) -> bool:
        try:
            calls = utils.default_decode_ast_prompting(answer)
        except Exception:  # whatever a model wrote that is no list of calls
            return False
        wanted = copy.deepcopy(item["ground_truth"])
        found = ast_checker(item["function"], calls, wanted, python, category, _NAME)
        return bool(found["valid"])

    return Checker(prompt, valid)


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Inside, the package's modules can be imported without what it wants installed beside it."""
    absent = {}
    for name, names in _LEFT_OUT:
        module = ModuleType(name)
        for one in names:
            setattr(module, one, None)
        absent[name] = module
    models = {_NAME: type("Model", (), {"underscore_to_dot": False})}
    absent["bfcl_eval.constants.model_config"].MODEL_CONFIG_MAPPING = models  # type: ignore[attr-defined]
    absent = {name: module for name, module in absent.items() if name not in sys.modules}
    variable = "BFCL_PROJECT_ROOT"
    before = os.environ.get(variable)
    # It makes directories for results when it is imported.
    with scratch.directory("results") as place:
        os.environ[variable] = str(place)
        sys.modules |= absent
        sys.path.insert(0, str(root))
        try:
            yield
        finally:
            sys.path.remove(str(root))
            sys.modules.pop("tenacity" if "tenacity" in absent else "", None)
            os.environ.pop(variable) if before is None else os.environ.update({variable: before})
