"""A run whose clock is set while it trains, and that goes on under another: losses, seconds and what it shows."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.clock import Clock
from tests.support.commands import Commands
from tests.support.kill_trials import trained

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS, SAVED_EVERY, HOUR = 200, 20, 3600
LONGEST_S = 200
# tqdm's: 3/9 [00:01<00:02
BAR = re.compile(r"\d+/\d+ \[([-\d:]+)<([-\d:?]+)")


def seconds(shown: str) -> int:
    """Of H:MM:SS; what is not known counts as none."""
    assert "-" not in shown, shown
    total = 0
    for part in shown.split(":") if shown != "?" else ():
        total = 60 * total + int(part)
    return total


class Run:
    """A distillation under a clock that is set at some of its steps. `nproc`: 2 for two tensor-parallel ranks."""

    def __init__(self, commands: Commands, overrides: list[str], run_dir: Path, nproc: int | None) -> None:
        self.commands, self.run_dir, self.log = commands, run_dir, Path(f"{run_dir}.log")
        self.command = commands.command("distill", *overrides, f"run_dir={run_dir}", nproc=nproc)
        self.clock = Clock(run_dir.with_suffix(".clock"))

    def until(self, actions: dict[int, Callable[["subprocess.Popen[bytes]"], object]]) -> int:
        """Run to the end; at each of these steps something is done. The exit code; its bars have to be sane."""
        begin = time.monotonic()
        environment = self.commands.environment(**self.clock.environment)
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                self.command, env=environment, cwd=self.commands.home, stdout=log, stderr=log
            )
        todo = dict(actions)
        try:
            while process.poll() is None and time.monotonic() - begin < LONGEST_S:
                if todo and self.steps() >= min(todo):
                    todo.pop(min(todo))(process)
                time.sleep(0.005)
        finally:
            late = process.poll() is None
            process.kill()
            process.wait()
        assert not late, self.log.read_text()[-3000:]
        assert not todo, self.log.read_text()[-3000:]
        self.commands.wait_for_orphans()
        bars = BAR.findall(self.log.read_text())
        assert len(bars) > STEPS // 10
        assert max(seconds(elapsed) for elapsed, _ in bars) <= time.monotonic() - begin
        assert max(seconds(left) for _, left in bars) < HOUR
        return process.returncode

    def steps(self) -> int:
        """How many were done."""
        file = self.run_dir / "steps.jsonl"
        return file.read_bytes().count(b'"train"') if file.exists() else 0

    def set(self, to: int) -> Callable[["subprocess.Popen[bytes]"], object]:
        """An action."""
        return lambda process: self.clock.set(to)


@pytest.mark.parametrize("nproc", [None, 2], ids=["one", "tp2"])
def test_a_clock_that_is_set_changes_nothing(
    commands: Commands, teacher: Teacher, pruned: Pruned, nproc: int | None
) -> None:
    """7 hours on, 9 back of it, SIGKILL; then a month back, and 5 hours on again."""
    own = {
        "max_steps": STEPS,
        "val_check_interval": SAVED_EVERY,
        "limit_val_batches": 1,
        "optim.warmup_steps": 1,
    }
    overrides = [
        "+conf=width",
        *commands.data(),
        f"student={pruned.run_dir}",
        f"teacher={teacher.huggingface}",
    ]
    overrides += [f"distill.{key}={value}" for key, value in own.items()] + ["data.seq_length=16"]
    overrides += [f"trainer.tensor_model_parallel_size={nproc or 1}"]
    straight = commands.home / f"straight-{nproc}"
    commands.run("distill", *overrides, f"run_dir={straight}", nproc=nproc).result()

    begin = time.monotonic()
    run = Run(commands, overrides, commands.home / f"jumping-{nproc}", nproc)
    asked = "import time; print(time.time())"
    run.clock.set(-8 * HOUR)
    said = subprocess.run(
        [sys.executable, "-c", asked], env=os.environ | run.clock.environment, capture_output=True
    )
    assert float(said.stdout) == pytest.approx(time.time() - 8 * HOUR, abs=60)
    run.clock.set(0)

    code = run.until(
        {40: run.set(7 * HOUR), 90: run.set(-2 * HOUR), 150: lambda process: process.kill()},
    )
    assert code == -9
    kept = run.steps()
    run.clock.set(-30 * 24 * HOUR)
    assert run.until({kept + 10: run.set(5 * HOUR)}) == 0

    took = time.monotonic() - begin
    assert trained(run.run_dir) == trained(straight)
    lines = [json.loads(line) for line in (run.run_dir / "steps.jsonl").read_text().splitlines()]
    spent = [line["seconds"] for line in lines if line["split"] == "train"]
    assert len(spent) == STEPS
    assert min(spent) > 0
    assert sum(spent) < took
    assert 0 < json.loads((run.run_dir / "result.json").read_text())["wall_s"] < took
