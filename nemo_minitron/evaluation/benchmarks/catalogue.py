"""Benchmarks by name: the harness's own with their data on the hub, those out of packages, and a user's JSONL file."""

import contextlib
import difflib
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.data.records import TEXT, kind_of
from nemo_minitron.errors import InputError, first_line, need_package
from nemo_minitron.evaluation.benchmarks import judged
from nemo_minitron.evaluation.benchmarks.items import tasks_of_harness
from nemo_minitron.evaluation.benchmarks.local import ACC_NORM, LOCAL, multiple_choice
from nemo_minitron.evaluation.benchmarks.of_files import OF_FILES
from nemo_minitron.evaluation.multiple_choice import load_questions

# Where the harness keeps the tasks of the presets; to look through all of its files takes half a minute.
_DIRECTORIES = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "gsm8k": "gsm8k",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "winogrande": "winogrande",
}
_PATIENCE_S = 5


@dataclass(frozen=True)
class Wanted:
    """A benchmark by name, or by file. `shots`: solved examples before each question; None: the task's own number.
    `items`: the file of its items, for those that the user has (`of_files`)."""

    name: str
    shots: int | None
    items: str | None = None

    @property
    def chat(self) -> bool:
        """Whether it is made for models that answer messages."""
        return self.judged or (self.name in LOCAL and LOCAL[self.name].chat)

    @property
    def judged(self) -> bool:
        """Whether a judge rates the answers."""
        return self.name == judged.NAME

    @property
    def label(self) -> str:
        """What its row and its file of items are called."""
        return Path(self.name).stem if self.is_file else self.name

    @property
    def is_file(self) -> bool:
        """Whether it is a user's file of questions."""
        return kind_of(self.name) != TEXT


@dataclass(frozen=True)
class Benchmark:
    """One that is ready to be run. `task`: the harness's Task or Group, its items read; the questions where a judge
    rates."""

    wanted: Wanted
    task: Any


def parse_names(names: Sequence[str], *, allow_code: bool = True) -> list[Wanted]:
    """`NAME`, `NAME@SHOTS`, or either with `=FILE`.

    Args:
        allow_code: whether what a model wrote may be run.

    Raises:
        InputError: no number of shots, a name that is there twice, one that lacks its file, or one that may not be run.
    """
    found: list[Wanted] = []
    for text in names:
        wanted = _wanted(text)
        if wanted.name in OF_FILES:
            kind = OF_FILES[wanted.name]
            if kind.runs_code and not allow_code:
                raise InputError(
                    f"eval.tasks={text}: runs what the model wrote; eval.allow_code=true allows it, in a process with "
                    "little time and memory"
                )
            if wanted.items is None and not kind.on_hub:
                raise InputError(
                    f"eval.tasks={text}: needs a file of its items, eval.tasks=[{wanted.name}=FILE]"
                )
        if wanted.label in [other.label for other in found]:
            raise InputError(f"eval.tasks={text}: {wanted.label} is there twice")
        found.append(wanted)
    return found


def _wanted(text: str) -> Wanted:
    before, equals, file = text.partition("=")
    named = bool(equals) and before.partition("@")[0] in OF_FILES
    if named and not file:
        raise InputError(f"eval.tasks={text}: after = must be a file")
    head = before if named else text
    name, at, shots = head.rpartition("@")
    if at and not shots.isdigit():
        raise InputError(f"eval.tasks={text}: after @ must be a number of examples, such as {name}@5")
    return Wanted(name if at else head, int(shots) if at else None, file if named else None)


def load(wanted: Sequence[Wanted], data: DataConfig) -> list[Benchmark]:
    """Read the items of benchmarks.

    Raises:
        InputError: an unknown name, data that is not here and cannot be fetched, or a bad line of a file.
    """
    if not wanted:
        return []
    need_package("lm_eval", "eval.tasks", "dev,search,device,evaluation")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return [Benchmark(one, _task(one, data)) for one in wanted]


def _task(wanted: Wanted, data: DataConfig) -> Any:
    if wanted.judged:
        return judged.questions(data)
    if wanted.is_file:
        return _configured(wanted.label, _of_file(wanted.name))
    if wanted.name in LOCAL:
        return _configured(wanted.name, LOCAL[wanted.name].config(data))
    if wanted.name in OF_FILES:
        config = OF_FILES[wanted.name].config(wanted.items)
        return _configured(wanted.name, config) if wanted.items else _of_hub(wanted.name, config)
    return _of_harness(wanted.name)


def _configured(name: str, config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config={"task": name, **config})


def _of_hub(name: str, config: dict[str, Any]) -> Any:
    """A task of ours whose items the hub has."""
    with _without_remote_code():
        try:
            return _configured(name, config)
        except Exception as error:  # as of the harness's own
            raise InputError(_hub_failure(name, error)) from None


def _of_file(path: str) -> dict[str, Any]:
    items = [{"question": q.question, "choices": q.choices, "gold": q.answer} for q in load_questions(path)]
    return multiple_choice(items, "{{question}}", ACC_NORM)


def _of_harness(name: str) -> Any:
    from lm_eval.tasks import TaskManager

    if directory := _DIRECTORIES.get(name):
        manager = TaskManager(include_defaults=False, include_path=str(tasks_of_harness() / directory))
    else:
        manager = TaskManager()
        if name not in manager.all_tasks:
            known = [*LOCAL, *OF_FILES, judged.NAME, *manager.all_tasks]
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
            raise InputError(
                f"eval.tasks={name}: no such benchmark; near are {', '.join(near)}"
                if near
                else f"eval.tasks={name}: no such benchmark; out of packages there are {', '.join(LOCAL)}"
            )
    with _without_remote_code():
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, huggingface_hub, requests and the operating system
            raise InputError(_hub_failure(name, error)) from None
    task = loaded["groups"].get(name) or next(iter(loaded["tasks"].values()))
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"eval.tasks={name}: the harness would run what the model wrote in this very process; of such benchmarks "
            "only mbpp is run here, with eval.allow_code=true"
        )
    return task


def _hub_failure(name: str, error: Exception) -> str:
    return (
        f"eval.tasks={name}: its data is neither in the cache nor to be had from the hub ({first_line(error)}); "
        "eval=local needs no hub"
    )


@contextlib.contextmanager
def _without_remote_code() -> Iterator[None]:
    """Inside, no loading script of a data set is run, whatever a task asks for; and where there is no hub, what is in
    its cache is taken at once."""
    import datasets
    import huggingface_hub.constants as hub

    if not hub.HF_HUB_OFFLINE and not _reachable(hub.ENDPOINT):
        # Else each of its files is tried six times, over half a minute.
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    load_dataset = datasets.load_dataset

    def plain(*args: Any, trust_remote_code: Any = None, **options: Any) -> Any:
        return load_dataset(*args, trust_remote_code=False, **options)

    datasets.load_dataset = partial(plain)
    try:
        yield
    finally:
        datasets.load_dataset = load_dataset


def _reachable(endpoint: str) -> bool:
    """Whether the hub's machine answers; a proxy may know better than this one."""
    if getproxies().keys() & {"https", "http", "all"}:
        return True
    url = urlsplit(endpoint)
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True
