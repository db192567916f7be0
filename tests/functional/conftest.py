"""Fixtures of the functional tests: one small teacher and one pruned student serve them all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Commands, Ended


@dataclass(frozen=True)
class Teacher:
    """What recipes/pretrain.py left: the run, its Hugging Face export and its result."""

    run_dir: Path
    huggingface: Path
    ended: Ended
    result: dict[str, Any]


@dataclass(frozen=True)
class Pruned:
    """What recipes/prune.py +conf=width left, in one process."""

    run_dir: Path
    ended: Ended
    result: dict[str, Any]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def teacher(commands: Commands) -> Teacher:
    run_dir, export = commands.home / "teacher", commands.home / "teacher-hf"
    ended = commands.pretrain(run_dir, "trainer.max_steps=30", f"export_dir={export}")
    return Teacher(run_dir, export, ended, ended.result())


@pytest.fixture(scope="session")
def pruned(commands: Commands, teacher: Teacher) -> Pruned:
    run_dir = commands.home / "pruned"
    ended = commands.prune(teacher.huggingface, run_dir)
    return Pruned(run_dir, ended, ended.result())
