"""MBPP: programs that a model wrote are run against three assertions each, in a process that may do little.

The prompt and the three solved examples are the harness's own (lm_eval/tasks/mbpp@0.4.13), which itself would run what
was written in this process's copies, with a metric that it loads from the hub. Items: of the hub
(google-research-datasets/mbpp), or of mbpp.jsonl, tasks 11 to 510 (arXiv 2108.07732, appendix A.1).
"""

import ast
import contextlib
import functools
import json
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from nemo_minitron import scratch
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks.items import dataset, records, tasks_of_harness

SECONDS, MEMORY_BYTES = 10, 1 << 30
_LONGEST_OUTPUT = 1 << 20
_TEST = range(11, 511)
_FENCED = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)
_TEXT = (
    "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:\n\n"
    "{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n"
)
# Of an audited process: nothing outside of it is changed, started or spoken to.
_CHILD = """
import os, sys, json
asked = json.load(sys.stdin)
def refuse(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    reads = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    parts = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "signal.", "pty.", "fcntl.", "mmap.", "winreg.")
    if writes or (event.startswith(parts) and event not in reads):
        raise PermissionError(event)
sys.addaudithook(refuse)
exec(compile(asked["program"], "program", "exec"), {"__name__": "__main__"})
sys.stdout.write(asked["said_at_the_end"])
"""


def config(file: str | None) -> dict[str, Any]:
    """The harness's task.

    Args:
        file: of items; None: the hub's.

    Raises:
        InputError: a bad line, or no item of the test split.
    """
    source: dict[str, Any] = {"dataset_path": "google-research-datasets/mbpp", "dataset_name": "full"}
    if file is not None:
        items = [
            {key: row[key] for key in ("task_id", "text", "code", "test_list", "test_setup_code")}
            for row in records(file, _check)
            if row["task_id"] in _TEST
        ]
        if not items:
            raise InputError(f"{file}: holds no task_id from {_TEST[0]} to {_TEST[-1]}, MBPP's test split")
        source = {"custom_dataset": dataset(items)}
    return {
        **source,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": _TEXT,
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "fewshot_config": {"sampler": "first_n", "samples": _examples()},
        "generation_kwargs": {"until": ["[DONE]"], "do_sample": False, "max_gen_toks": 512},
        "process_results": lambda item, answers: {"pass_at_1": float(solves(item, answers[0]))},
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
    }


def _check(row: dict[str, Any], where: str) -> None:
    for key, kind in (("task_id", int), ("text", str), ("code", str), ("test_setup_code", str)):
        if not isinstance(row.get(key), kind):
            raise InputError(f"{where}: {key}: must be {'an integer' if kind is int else 'a string'}")
    tests = row.get("test_list")
    if not isinstance(tests, list) or len(tests) < 3 or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{where}: test_list: must be a list of at least 3 strings")


@functools.cache
def _examples() -> list[dict[str, Any]]:
    """The harness's solved examples, read as text: its module would load a metric of the hub."""
    tree = ast.parse((tasks_of_harness() / "mbpp/utils.py").read_text(encoding="utf-8"))
    (function,) = (
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "list_fewshot_samples"
    )
    (returned,) = (n for n in function.body if isinstance(n, ast.Return))
    assert returned.value is not None
    found: list[dict[str, Any]] = ast.literal_eval(returned.value)
    return found


def solves(item: dict[str, Any], answer: str) -> bool:
    """Whether a program passes its item's assertions."""
    fenced = _FENCED.search(answer)
    code = fenced[1] if fenced else answer
    return runs_to_its_end("\n".join([code, item["test_setup_code"], *item["test_list"]]))


def runs_to_its_end(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Run a program in a process of its own; false where it raises, exits, takes too long or too much.

    It has no network where the system allows that (`unshare`), an empty environment, an empty directory, a CPU time, a
    memory; what would write a file, remove one or start a process raises. This keeps accidents away, and is no prison.
    """
    word = secrets.token_hex(16)
    with scratch.directory("program") as place:
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-I", "-B", "-c", _CHILD],
            cwd=place,
            env={"PYTHONHASHSEED": "0", "PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_limited(seconds, memory_bytes),
        )
        asked = json.dumps({"program": program, "said_at_the_end": word}).encode()
        try:
            said, _ = process.communicate(asked, timeout=seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            _end(process)
    return process.returncode == 0 and said[-len(word) :] == word.encode()


def _limited(seconds: float, memory_bytes: int) -> Callable[[], None]:
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: _LONGEST_OUTPUT,
        resource.RLIMIT_CORE: 0,
    }

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))

    return limit


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The process and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@functools.cache
def _without_network() -> tuple[str, ...]:
    """The beginning of a command line that takes the network away; one line says where there is none."""
    command = shutil.which("unshare")
    for options in ([], ["--user", "--map-root-user"]) if command else []:
        line = [str(command), *options, "--net", "--"]
        if subprocess.run([*line, "true"], capture_output=True).returncode == 0:
            return tuple(line)
    print("eval.allow_code: unshare cannot take the network away here; programs run with it", file=sys.stderr)
    return ()
