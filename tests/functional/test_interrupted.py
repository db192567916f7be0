"""Training that is told to end, without SLURM: it saves, ends with exit code 75, and goes on to the same losses."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import Commands
from tests.support.kill_trials import distilling, trained

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def overrides(commands: Commands, teacher: Teacher, pruned: Pruned) -> list[str]:
    made = distilling(commands, pruned.run_dir, teacher.huggingface, steps=60).overrides
    return [text for text in made if "parallel" not in text]


def test_told_to_end_in_turns(commands: Commands, overrides: list[str]) -> None:
    """By SIGUSR1, then by Ctrl-C, which saves nothing more, then by SIGTERM."""
    straight, run_dir = commands.home / "not-told", commands.home / "told"
    commands.run("distill", *overrides, f"run_dir={straight}").result()
    for number, step in ((signal.SIGUSR1, 4), (signal.SIGINT, 14), (signal.SIGTERM, 24)):
        process = subprocess.Popen(
            commands.command("distill", *overrides, f"run_dir={run_dir}"),
            env=commands.environment(),
            cwd=commands.home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_step(process, run_dir / "steps.jsonl", step)
        process.send_signal(number)
        stderr = process.communicate(timeout=300)[1]
        if number == signal.SIGINT:
            assert process.returncode == 130, stderr
            said = f"interrupted: {run_dir} keeps what was finished; the same command goes on from there"
            assert stderr.splitlines()[-1] == said
            assert "Traceback" not in stderr
        else:
            assert process.returncode == 75, stderr
            assert "interrupted: a checkpoint was saved after step" in stderr
        assert not (run_dir / "result.json").exists()
    commands.run("distill", *overrides, f"run_dir={run_dir}").result()
    assert trained(run_dir) == trained(straight)


def wait_for_step(process: "subprocess.Popen[str]", steps: Path, step: int) -> None:
    """Until the training has written this step's line."""
    give_up = time.monotonic() + 300
    while not (steps.exists() and f'"step": {step}, "split": "train"' in steps.read_text()):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.005)
