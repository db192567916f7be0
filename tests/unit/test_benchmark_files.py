"""Benchmarks of a user's files and of programs that a model wrote: scored right, refused in a line, kept in bounds."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import catalogue, code, harness
from nemo_minitron.evaluation.benchmarks.adapter import ShardedLM
from nemo_minitron.evaluation.benchmarks.answers import Answers
from nemo_minitron.evaluation.benchmarks.catalogue import Wanted, parse_names
from tests.unit.test_benchmark_catalogue import Bytes

TASK = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b): return a + b",
    "test_setup_code": "",
    "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
}
NEWS = {
    "text": "The town has a new bridge. It opened on Monday.",
    "summary": "A new bridge opened in the town.",
}
CHAT = {
    "messages": [
        {"role": "user", "content": "What opened?"},
        {"role": "assistant", "content": "A bridge."},
        {"role": "user", "content": "When?"},
    ],
    "ctxs": [{"title": f"News {n}", "text": f"Document {n}."} for n in range(7)],
    "answers": ["on Monday", "last Monday morning"],
}


class Says:
    """Answers in turn."""

    slice_requests, max_length = 8, 4096

    def __init__(self, *answers: str) -> None:
        self.answers, self.prompts = list(answers), list[str]()

    def log_likelihoods(self, requests: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def write(self, prompts: Any, *_: Any) -> list[list[int]]:
        self.prompts += [bytes(prompt).decode() for prompt in prompts]
        return [list(self.answers.pop(0).encode()) for _ in prompts]


def wrote(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(name: str, model: Says, tmp_path: Path) -> dict[str, float]:
    (benchmark,) = catalogue.load(parse_names([name]), DataConfig(cache_dir=str(tmp_path)))
    lm = ShardedLM(model, Bytes(), Answers(None))
    rows, items = harness.run(lm, benchmark, harness.Settings(None, False, None))
    assert items
    return {row.metric: row.score for row in rows}


def test_a_benchmark_of_a_file_is_named_with_it() -> None:
    assert parse_names(["xlsum=a=b.jsonl", "mbpp@3=m.jsonl", "mbpp2=x"]) == [
        Wanted("xlsum", None, "a=b.jsonl"),
        Wanted("mbpp", 3, "m.jsonl"),
        Wanted("mbpp2=x", None),
    ]
    for name, part in (
        ("xlsum", r"needs a file of its items, eval.tasks=\[xlsum=FILE\]"),
        ("chatrag=", "after = must be a file"),
        ("mbpp@x=f", "after @ must be a number"),
        ("mbpp", "runs what the model wrote; eval.allow_code=true"),
        ("mbpp@0=f", "runs what the model wrote; eval.allow_code=true"),
    ):
        with pytest.raises(InputError, match=part):
            parse_names([name], allow_code=False)


@pytest.mark.parametrize(
    ("name", "row", "part"),
    [
        ("mbpp", {**TASK, "test_list": ["assert 1"]}, "test_list: must be a list of at least 3"),
        ("mbpp", {**TASK, "task_id": "11"}, "task_id: must be an integer"),
        ("mbpp", {**TASK, "text": None}, "text: must be a string"),
        ("xlsum", {"text": "a", "summary": " "}, "summary: must be a string that is not blank"),
        ("chatrag", {**CHAT, "messages": CHAT["messages"][:2]}, "messages: the last must be the user's"),
        ("chatrag", {**CHAT, "ctxs": []}, "ctxs: must be a list of documents"),
        ("chatrag", {**CHAT, "answers": "on Monday"}, "answers: must be a list of strings"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, row: Any, part: str) -> None:
    good = {"mbpp": TASK, "xlsum": NEWS, "chatrag": CHAT}[name]
    file = wrote(tmp_path / "f.jsonl", good, row)
    with pytest.raises(InputError, match=f"f.jsonl, line 2: {part}"):
        catalogue.load(parse_names([f"{name}={file}"]), DataConfig(cache_dir=str(tmp_path)))


def test_items_of_other_splits_alone_are_refused(tmp_path: Path) -> None:
    file = wrote(tmp_path / "f.jsonl", {**TASK, "task_id": 600})
    with pytest.raises(InputError, match="holds no task_id from 11 to 510"):
        catalogue.load(parse_names([f"mbpp={file}"]), DataConfig(cache_dir=str(tmp_path)))


def test_mbpp_counts_programs_that_pass_all_assertions(tmp_path: Path) -> None:
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
    rows = [{**TASK, "task_id": 11 + n, "text": f"Task {n}. {'x' * (9 - n)}"} for n in range(4)]
    model = Says(right, wrong, f"Here it is:\n```python\n{right}\n```\nDone.", "def add(")
    file = wrote(tmp_path / "mbpp.jsonl", *rows, {**TASK, "task_id": 700})
    assert scored(f"mbpp@3={file}", model, tmp_path) == {"pass_at_1": 0.5}
    assert len(model.prompts) == 4
    first = model.prompts[0]
    assert first.count("[DONE]") == 3
    assert first.endswith("assert add(-1, 1) == 0\n[BEGIN]\n")
    assert "def similar_elements" in first


def test_rouge_is_that_of_hand(tmp_path: Path) -> None:
    """ "The bridge opened" beside "a new bridge open in the town": 2 of 3 words, 2 of 7, stems counted alike."""
    file = wrote(tmp_path / "news.jsonl", NEWS)
    model = Says("The bridges opened")
    found = scored(f"xlsum={file}", model, tmp_path)
    assert model.prompts == [f"Article: {NEWS['text']}\n\nSummary:"]
    precision, recall = 3 / 3, 3 / 7  # the, bridge, open
    assert found["rouge1"] == pytest.approx(2 * precision * recall / (precision + recall))
    precision, recall = 2 / 3, 2 / 7  # in their order
    assert found["rougeL"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 6) / (1 / 2 + 1 / 6))


def test_answers_from_documents_are_rated_by_the_best_reference(tmp_path: Path) -> None:
    file = wrote(tmp_path / "rag.jsonl", CHAT)
    model = Says(" On Monday morning.")
    assert scored(f"chatrag={file}", model, tmp_path) == {
        "f1": pytest.approx(0.8)
    }  # 2 of 3 and of 3, 2 of 3 and of 2
    (prompt,) = model.prompts
    assert "title: News 4, source: Document 4." in prompt
    assert "News 5" not in prompt
    assert prompt.endswith("User: What opened?\n\nAssistant: A bridge.\n\nUser: When?\n\nAssistant:")


def test_passages_are_those_of_the_instruct_set(tmp_path: Path) -> None:
    """Each item's own answer is right, another item's is not."""
    from nemo_minitron.data.instruct.generate import samples

    rows = [row for row in samples("test", 100, 1234) if row["category"] == "passage"]
    own = {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in rows}

    class Knows(Says):
        def write(self, prompts: Any, *_: Any) -> list[list[int]]:
            return [list(own[bytes(prompt).decode()].encode()) for prompt in prompts]

    assert scored("instruct_passage_100", Knows(), tmp_path) == {"right": 1.0, "right_lenient": 1.0}
    assert scored("instruct_passage_100", Says(*["a raven"] * 100), tmp_path)["right"] < 0.1


# ---- programs ------------------------------------------------------------------------------------------------


def test_a_program_has_to_come_to_its_end() -> None:
    assert code.runs_to_its_end("import math, re, heapq, collections\nassert math.gcd(4, 6) == 2")
    for program in (
        "assert False",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "1 +",
        "import os; os._exit(0)",
        "print('x' * 100); quit()",
    ):
        assert not code.runs_to_its_end(program), program


def test_a_program_has_little_time_and_memory() -> None:
    begin = time.monotonic()
    for program in ("while True: pass", "import time; time.sleep(60)", "input()\nwhile True: pass"):
        assert not code.runs_to_its_end(program, seconds=1)
    assert time.monotonic() - begin < 15
    assert not code.runs_to_its_end("x = bytearray(900_000_000)", memory_bytes=1 << 29)
    assert code.runs_to_its_end("x = bytearray(1_000_000)", memory_bytes=1 << 29)


def test_a_program_changes_and_starts_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    target = str(tmp_path / "made")
    for program in (
        f"open({target!r}, 'w')",
        f"import os; os.mkdir({target!r})",
        f"import os; os.open({target!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.remove({str(kept)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({target!r}).write_text('x')",
        f"import subprocess; subprocess.run(['touch', {target!r}])",
        f"import os; os.system('touch {target}')",
        f"import os; os.kill({os.getpid()}, 0)",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None)",
    ):
        assert not code.runs_to_its_end(program), program
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert code.runs_to_its_end(f"assert open({str(kept)!r}).read() == 'here'")
    # Nothing of the environment is handed on.
    os.environ["A_SECRET"] = "x"
    try:
        assert code.runs_to_its_end(
            "import os; assert 'A_SECRET' not in os.environ and 'HOME' not in os.environ"
        )
    finally:
        del os.environ["A_SECRET"]


def test_a_program_has_no_network() -> None:
    heard: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]

        def listen() -> None:
            try:
                server.accept()[0].close()
                heard.append(True)
            except OSError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        assert not code.runs_to_its_end(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
        thread.join()
    assert not heard
