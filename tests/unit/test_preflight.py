"""What recipes ask of a checkpoint before it is opened, and what they say of the corpus that it meets."""

import logging
import os
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.recipes import PruneRecipe, parse
from nemo_minitron.data import corpora
from nemo_minitron.data.stdlib import stdlib_corpus
from nemo_minitron.workflows.prune import check
from tests.support.hf_families import make_model

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library; a Hugging Face directory is not converted, which is NeMo's work."""
    library = Path(os.__file__).parent
    for package in ("email", "json"):
        shutil.copytree(library / package, tmp_path / "library" / package)
    for module in library.glob("*.py"):  # enough units for a share of them to be held out
        if module.stat().st_size < 10_000:
            shutil.copy(module, tmp_path / "library")
    monkeypatch.setattr(corpora, "stdlib_corpus", lambda: stdlib_corpus(tmp_path / "library"))
    monkeypatch.setattr(check, "converted", lambda source, _: source)
    return tmp_path


def said(home: Path, source: Path, caplog: pytest.LogCaptureFixture, **more: object) -> list[str]:
    settings = {
        "source": str(source),
        "run_dir": "run",
        "data": {"cache_dir": str(home), "seq_length": 8},
        "prune": {"ffn_hidden_size": "1/2", "calibration_samples": 1},
        **more,
    }
    with caplog.at_level(logging.INFO, "nemo_minitron"):
        check.check(parse(PruneRecipe, OmegaConf.create(settings)))
    return [record.getMessage() for record in caplog.records if "data=" in record.getMessage()]


def test_a_foreign_model_is_told_that_the_default_corpus_is_python(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(home / "hf", "mistral")
    assert said(home, home / "hf", caplog) == [
        "data=stdlib calibrates on Python code; for other text say data=files data.train=FILES"
    ]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # one rank is enough
    assert said(home, home / "hf", caplog) == []


def test_other_text_and_the_demo_teacher_are_told_nothing(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(home, DEMO, caplog) == []
    make_model(home / "hf", "mistral")
    files = {"name": "files", "train": f"{home}/library/email/*.py", "valid": f"{home}/library/json/*.py"}
    data = {**files, "cache_dir": str(home), "seq_length": 8}
    assert said(home, home / "hf", caplog, data=data) == []
