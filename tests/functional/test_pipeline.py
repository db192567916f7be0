"""`recipes/pipeline.py`: killed anywhere it ends as one that was not; what is made stays, what changed is made anew."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Teacher
from tests.support.commands import Commands
from tests.support.kill_trials import fields, trained

pytestmark = pytest.mark.slow

SEED = 1


def overrides(commands: Commands, teacher: Teacher, run_dir: Path, *more: str) -> list[str]:
    off = ("correct", "sft", "preference", "answers", "evaluate", "export", "device", "report")
    training = ("max_steps=4", "val_check_interval=2", "limit_val_batches=1", "optim.warmup_steps=1")
    return [
        *commands.data(),
        f"source={teacher.huggingface}",
        f"run_dir={run_dir}",
        *(f"pipeline.steps.{name}.on=false" for name in off),
        "pipeline.steps.prune.set.prune.calibration_samples=16",
        *(f"pipeline.steps.distill.set.distill.{setting}" for setting in training),
        "pipeline.steps.gguf.set.license=mit",
        *more,
    ]


def made(run_dir: Path) -> dict[str, Any]:
    """What the steps came to, without times, and where they lie."""
    (file,) = (run_dir / "gguf").rglob("*.gguf")
    pruned = fields(run_dir / "prune")
    return {
        "kept": (run_dir / "prune" / "scores.safetensors").read_bytes(),
        "loss": pruned["lm_loss_nats_after"],
        "training": trained(run_dir / "distill")[1],
        "bytes": file.read_bytes()[-200_000:],
    }


def kill(commands: Commands, asked: list[str], after_s: float) -> bool:
    """Start a pipeline and kill it after a while; whether it was still at work."""
    process = subprocess.Popen(
        commands.command("pipeline", *asked),
        env=commands.environment(),
        cwd=commands.home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(after_s)
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    commands.wait_for_orphans()  # a step that is still ending holds its run directory's lock
    return killed


def test_killed_at_a_random_moment_and_changed(commands: Commands, teacher: Teacher) -> None:
    straight, killed = commands.home / "straight", commands.home / "killed"
    first = commands.run("pipeline", *overrides(commands, teacher, straight))
    assert [run["step"] for run in first.result()["runs"]] == ["prune", "distill", "gguf"]

    asked = overrides(commands, teacher, killed)
    assert kill(commands, asked, random.Random(SEED).uniform(0.2, 0.9) * first.seconds), "it was done before"
    assert not (killed / "result.json").exists()
    commands.run("pipeline", *asked).result()
    assert made(killed) == made(straight)

    # Typed again it has a result; a changed setting of one step makes that one and those after it again.
    assert "already holds a result" in commands.run("pipeline", *overrides(commands, teacher, killed)).stderr
    changed = ("pipeline.steps.distill.set.distill.max_steps=3", "overwrite=true")
    runs = commands.run("pipeline", *overrides(commands, teacher, killed, *changed)).result()["runs"]
    assert {run["step"]: run["kept"] for run in runs} == {
        "prune": True,
        "distill": False,
        "gguf": False,
    }
    assert json.loads((killed / "distill" / "result.json").read_text())["steps"] == 3
    assert "| prune | prune |" in (killed / "summary.md").read_text()

    # Another teacher under finished steps.
    other = commands.home / "other-teacher"
    os.symlink(teacher.huggingface, other)
    command = overrides(commands, teacher, straight, f"source={other}", "overwrite=true")
    assert all(run["kept"] for run in commands.run("pipeline", *command).result()["runs"])
    (straight / "result.json").unlink()
    refused = commands.run("pipeline", *overrides(commands, teacher, straight, f"source={killed / 'prune'}"))
    assert refused.code == 2
    assert "is not what prune, distill, gguf in" in refused.stderr.splitlines()[-1]
    refused = commands.run("pipeline", *overrides(commands, teacher, straight, "pipeline=minitron_depth"))
    assert refused.code == 2
    assert (
        "prune, distill, gguf of pipeline=minitron_width; choose another" in refused.stderr.splitlines()[-1]
    )


def test_what_cannot_run_is_refused_before_anything_does(commands: Commands, teacher: Teacher) -> None:
    run_dir = commands.home / "refused"
    for more, said in {
        "pipeline.steps.prune.on=false": "pipeline.steps.distill.set.student=@prune: prune is off before it",
        "pipeline.steps.prune.set.prune.iterations=0": "pipeline.steps.prune: prune.iterations=0",
        "pipeline.steps.prune.recipe=prunes": "pipeline.steps.prune: prunes: must be one of pretrain, prune",
        "pipeline.steps.distill.set.optim.lr=1": "pipeline.steps.distill: optim.lr=1: distill has no use for optim",
    }.items():
        done = commands.run("pipeline", *overrides(commands, teacher, run_dir, more))
        assert (done.code, said in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert not run_dir.exists()
