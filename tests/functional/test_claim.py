"""Two runs in one run directory: the second is refused; what a killed one left is taken over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.commands import ROOT
from tests.support.slurm_cluster import TINY


def test_the_second_is_refused_and_a_dead_one_s_lock_taken_over(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    work = "if r.prune.seed: (directory / 'ready').touch(); time.sleep(600)"
    recipe.write_text(TINY.replace("WORK", work))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "1"}
    command = [sys.executable, str(recipe), f"run_dir={tmp_path}/run", "prune=width"]

    first = subprocess.Popen([*command, "prune.seed=1"], env=env)
    try:
        give_up = time.monotonic() + 120
        while not (tmp_path / "run" / "ready").exists():
            assert time.monotonic() < give_up
            time.sleep(0.05)
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert f"run_dir={tmp_path}/run: process {first.pid} on " in line
        assert "choose another run_dir" in line
        assert not (tmp_path / "run" / "result.json").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {first.pid} ")
    third = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert third.returncode == 0, third.stderr
    assert (tmp_path / "run" / "result.json").exists()
