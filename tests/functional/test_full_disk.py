"""A disk that is full when a checkpoint is written: a small tmpfs, so only root can run this."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import Commands
from tests.support.kill_trials import distilling, trained
from tests.support.slurm_cluster import REQUIRED

pytestmark = pytest.mark.slow

STEPS = 60
MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=60)
    if done.returncode:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but mount fails: {done.stderr}")
        pytest.skip(f"no tmpfs of its own: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=60)


def fill(disk: Path, run_dir: Path, stop: threading.Event) -> None:
    """Once the run has saved a checkpoint, leave it no room for the next."""
    checkpoints = run_dir / "nemo" / "checkpoints"
    while not stop.is_set():
        saved = [path for path in checkpoints.glob("*-last") if (path / "weights" / "metadata.json").exists()]
        if saved and not list(checkpoints.glob("*-unfinished")):
            break
        time.sleep(0.01)
    with open(disk / "filler", "wb", buffering=0) as filler:
        while not stop.is_set():
            try:
                filler.write(bytes(MIB // 16))
            except OSError:
                return


def test_the_last_good_checkpoint_stays(
    small_disk: Path, commands: Commands, teacher: Teacher, pruned: Pruned
) -> None:
    run_dir = small_disk / "run"
    subject = distilling(commands, pruned.run_dir, teacher.huggingface, steps=STEPS)
    overrides = [text for text in subject.overrides if "parallel" not in text]
    straight = commands.home / "plenty-of-room"
    commands.run("distill", *overrides, f"run_dir={straight}").result()

    stop = threading.Event()
    filling = threading.Thread(target=fill, args=(small_disk, run_dir, stop))
    filling.start()
    try:
        failed = commands.run("distill", *overrides, f"run_dir={run_dir}")
    finally:
        stop.set()
        filling.join()
    assert failed.code == 1, failed.stderr[-3000:]
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"error: the run failed: no space left on the disk of {run_dir} (")
    assert last.endswith(f"; {run_dir} keeps what was finished")
    assert not (run_dir / "result.json").exists()
    unfinished = {path.name for path in (run_dir / "nemo" / "checkpoints").glob("*-unfinished")}
    kept = [
        path.name
        for path in (run_dir / "nemo" / "checkpoints").glob("*-last")
        if f"{path.name}-unfinished" not in unfinished
    ]
    assert kept

    (small_disk / "filler").unlink()
    ended = commands.run("distill", *overrides, f"run_dir={run_dir}")
    assert ended.code == 0, ended.stderr[-3000:]
    assert comparable(trained(run_dir)) == comparable(trained(straight))


def comparable(outcome: Any) -> Any:
    return json.loads(json.dumps(outcome))
