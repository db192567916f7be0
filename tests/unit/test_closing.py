"""The closing line of a run, and where a student's teacher is looked for."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoints.origin import teacher_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.errors import InputError
from nemo_minitron.run import terminal
from nemo_minitron.run.closing import closing_line, count

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
LINES = {
    "prune: LM loss 3.960 -> 6.820 nats, 134.5M -> 81.4M parameters (61%), hidden_size 448 of 576, "
    "hidden_size rounded from 432.0": {
        "recipe": "prune",
        "lm_loss_nats_before": 3.96,
        "lm_loss_nats_after": 6.82,
        "params_before": 134_515_008,
        "params_after": 81_400_000,
        "kept": {"hidden_size": [448, 576]},
        "rounded_from": {"hidden_size": 432.0},
    },
    "pipeline: 2 runs, 1 of them kept": {"recipe": "pipeline", "runs": [{"kept": True}, {"kept": False}]},
    "report: done": {"recipe": "report", "runs": ["a"]},
    "compare: 2 models beside a: /r/compare.md": {
        "recipe": "compare",
        "models": {"a": {}, "b": {}},
        "baseline": "a",
        "table": "/r/compare.md",
    },
    "pretrain: LM loss 2.730 nats, 3.64M parameters, 100 steps": {
        "recipe": "pretrain",
        "lm_loss_nats": 2.73,
        "bits_per_byte": 1.473,
        "params": 3_640_000,
        "steps": 100,
    },
    "distill: LM loss 3.790 -> 2.973 nats, teacher 2.812 nats, 2.07M parameters, 100 steps, 204.8k tokens": {
        "recipe": "distill",
        "lm_loss_nats_before": 3.79,
        "lm_loss_nats_after": 2.973,
        "lm_loss_nats_teacher": 2.812,
        "params": 2_070_000,
        "steps": 100,
        "tokens": 204_800,
    },
    "cache_teacher: teacher 2.762 nats, 28 sequences, 14.3k tokens, 2.5 MiB, 1,235 tokens/s": {
        "recipe": "cache_teacher",
        "lm_loss_nats_teacher": 2.762,
        "sequences": 28,
        "tokens": 14_336,
        "bytes": 2_621_440,
        "tokens_per_s": 1234.6,
    },
    "sft: LM loss 2.970 -> 3.500 nats, validation loss 4.000 -> 0.500 nats, 1.24B parameters, 300 steps": {
        "recipe": "sft",
        "lm_loss_nats_before": 2.97,
        "lm_loss_nats_after": 3.5,
        "valid_loss_nats_before": 4.0,
        "valid_loss_nats_after": 0.5,
        "params": 1_235_814_400,
        "steps": 300,
    },
    "export: 3.64M parameters, perplexity 21.71, of F16 21.70": {
        "recipe": "export",
        "params": 3_640_000,
        "perplexity": 21.7104,
        "perplexity_f16": 21.7001,
    },
    "distill: LM loss 2.973 nats": {
        "recipe": "distill",
        "lm_loss_nats_before": None,
        "lm_loss_nats_after": 2.973,
    },
    "pretrain: LM loss 2.730 nats, 3.64M parameters": {
        "recipe": "pretrain",
        "lm_loss_nats": 2.73,
        "params": 3_640_000,
    },
    "evaluate: LM loss 2.874 nats, 3.64M parameters, perplexity 17.71, 1.551 bits a byte, KL 0.120 nats, "
    "81.0% as the teacher, hellaswag_100 0.270 ± 0.045 (at chance), gsm8k_100 0.310 ± 0.046": {
        "recipe": "evaluate",
        "params": 3_640_512,
        "lm_loss_nats": 2.8743,
        "perplexity": 17.7136,
        "bits_per_byte": 1.5509,
        "kl_from_teacher_nats": 0.12,
        "top1_agreement": 0.81,
        "scores": [
            {"task": "hellaswag_100", "score": 0.27, "stderr": 0.0446, "at_chance": True, "main": True},
            {"task": "hellaswag_100", "score": 0.25, "stderr": 0.0446, "at_chance": True, "main": False},
            {"task": "gsm8k_100", "score": 0.31, "stderr": 0.0462, "at_chance": False, "main": True},
        ],
    },
    "evaluate_instruct: 3.64M parameters, 23.3% of 400 answers right": {
        "recipe": "evaluate_instruct",
        "params": 3_640_000,
        "overall_score": 0.2334,
        "samples": 400,
    },
    "instruct_data: 6,000 train, 200 valid": {
        "recipe": "instruct_data",
        "train_samples": 6000,
        "valid_samples": 200,
    },
    "merge: 3.64M parameters, 2 models by ties": {
        "recipe": "merge",
        "params": 3_640_000,
        "models": ["A", "B"],
        "method": "ties",
    },
    "done: done": {},
}


@pytest.mark.parametrize("line", LINES)
def test_the_line(line: str) -> None:
    assert closing_line(LINES[line]) == line


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.00k"), (3_640_000, "3.64M"), (8e9, "8.00B")]
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


def finished(directory: Path, **fields: Any) -> Path:
    directory.mkdir()
    (directory / "result.json").write_text(json.dumps(fields))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "source"))


@pytest.fixture
def pruned(tmp_path: Path, source: Path) -> Path:
    sha256 = find_source(source).sha256()
    return finished(tmp_path / "pruned", recipe="prune", source=str(source), source_sha256=sha256)


def test_a_pruned_student_s_teacher_is_its_source(tmp_path: Path, source: Path, pruned: Path) -> None:
    assert teacher_of(pruned) == teacher_of(pruned / "checkpoint") == str(source)
    distilled = finished(tmp_path / "distilled", recipe="distill", student=str(pruned), teacher="/elsewhere")
    tuned = finished(tmp_path / "tuned", recipe="sft", student=str(distilled))
    assert teacher_of(tuned) == str(source)


def test_a_source_that_changed_or_went_is_no_teacher(source: Path, pruned: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(
        InputError, match=r"was pruned from .*/source, which has other weights now .*give teacher=DIR"
    ):
        teacher_of(pruned)
    shutil.rmtree(source)
    with pytest.raises(InputError, match=r"was pruned from .*/source: no such directory; give teacher=DIR"):
        teacher_of(pruned)


def test_a_student_that_does_not_say(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    finished(loop, recipe="distill", student=str(loop))
    for student in (
        DEMO,
        tmp_path / "nowhere",
        loop,
        finished(tmp_path / "broken", recipe="prune", source=3),
    ):
        with pytest.raises(InputError, match="does not say what it was pruned from; give teacher=DIR"):
            teacher_of(student)


def test_a_tracker_s_last_lines_come_before_the_recipe_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B prints when its run is finished; what reads a recipe's stdout takes its last line."""
    ended = []
    tracker = types.SimpleNamespace(run=None, finish=lambda: ended.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    terminal.let_trackers_end()
    assert not ended
    tracker.run = object()
    terminal.let_trackers_end()
    assert ended == ["finished"]
