"""Random settings and damaged files at the checks of all recipes; `make test-full` throws ten times as many."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "campaign", [["--overrides", "1000", "--files", "0"], ["--overrides", "0", "--files", "100"]]
)
def test_no_traceback_no_hang_nothing_executed(commands: Commands, campaign: list[str]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.fuzz.campaign",
            *campaign,
            "--seed",
            "7",
            "--home",
            str(commands.home / "fuzz"),
        ],
        cwd=ROOT,
        env=commands.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 faults" in done.stdout
