"""Items of benchmarks: read from JSONL files, handed to lm-evaluation-harness."""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_minitron.data.records import read_records
from nemo_minitron.errors import InputError
from nemo_minitron.files import lines


def rows(file: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        InputError: names the file and the line that is none, or lacks a key.
    """
    try:
        for number, line in enumerate(lines(file), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict) or (missing := [key for key in keys if key not in row]):
                what = f"{missing[0]!r} is missing" if isinstance(row, dict) else "must be a JSON object"
                raise InputError(f"{file}, line {number}: {what}")
            yield row
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def records(path: str, check: Callable[[dict[str, Any], str], object]) -> Iterator[dict[str, Any]]:
    """The records of a user's file (`data.records`), one or more.

    Args:
        check: of a record and where it stands; refuses it.

    Raises:
        InputError: no file, no record, or one that is refused.
    """
    count = 0
    for record in read_records(path):
        if isinstance(record.value, InputError):
            raise record.value
        row = dict(record.value)
        check(row, record.where)
        count += 1
        yield row
    if not count:
        raise InputError(f"{path}: holds no record")


def dataset(items: list[dict[str, Any]]) -> Callable[..., Any]:
    """What the harness asks for its documents: all in the split "test"."""

    def made(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(items)}

    return made


def written(
    items: list[dict[str, Any]],
    max_new_tokens: int,
    score: Callable[[dict[str, Any], str], dict[str, Any]],
    metrics: list[dict[str, Any]],
) -> dict[str, Any]:
    """The harness's task of items with a `prompt` that is answered in words; `score`: of an item and its answer."""
    return {
        "custom_dataset": dataset(items),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "process_results": lambda item, answers: score(item, answers[0]),
        "metric_list": metrics,
    }


def tasks_of_harness() -> Path:
    """The harness's directory of tasks; to import the harness for it would take seconds."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"
