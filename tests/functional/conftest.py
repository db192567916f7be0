"""Fixtures of the functional tests: one small teacher and one pruned student serve them all."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.tokenizer import load_tokenizer, tokenizer_sha256
from tests.support.commands import Commands, Ended


@dataclass(frozen=True)
class Teacher:
    """What recipes/pretrain.py left: the run, its Hugging Face export and its result."""

    run_dir: Path
    huggingface: Path
    ended: Ended
    result: dict[str, Any]

    def corpus(self, cache: Path) -> Path:
        """Where the recipes indexed its corpus with its own tokenizer: other tests index the same text with theirs."""
        tokenizer = tokenizer_sha256(load_tokenizer(str(self.huggingface)))
        wanted = {"manifest_sha256": self.result["data_sha256"], "tokenizer_sha256": tokenizer}
        found = [
            manifest.parent
            for manifest in (cache / "data").rglob("manifest.json")
            if wanted.items() <= json.loads(manifest.read_text()).items()
        ]
        assert len(found) == 1, found
        return found[0]


@dataclass(frozen=True)
class Pruned:
    """What recipes/prune.py +conf=width left, in one process."""

    run_dir: Path
    ended: Ended
    result: dict[str, Any]


@pytest.fixture(scope="session")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Who made the models that serve all tests."""
    home = tmp_path_factory.mktemp("founder")
    return Commands(home, home / "cache")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, founder: Commands) -> Commands:
    """A user for each file of tests: two files may name their run directories alike."""
    return Commands(tmp_path_factory.mktemp("user"), founder.cache)


@pytest.fixture(scope="session")
def teacher(founder: Commands) -> Teacher:
    run_dir, export = founder.home / "teacher", founder.home / "teacher-hf"
    ended = founder.pretrain(run_dir, "trainer.max_steps=30", f"export_dir={export}")
    return Teacher(run_dir, export, ended, ended.result())


@pytest.fixture(scope="session")
def pruned(founder: Commands, teacher: Teacher) -> Pruned:
    run_dir = founder.home / "pruned"
    ended = founder.prune(teacher.huggingface, run_dir)
    return Pruned(run_dir, ended, ended.result())
