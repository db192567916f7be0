"""A real SLURM on loopback for tests, and recipes that need no model to run under it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers import slurm_on_loopback
from tests.support.commands import ROOT, Commands

REQUIRED = "NEMO_MINITRON_REQUIRE_SLURM"
# The nodes have no GPU.
SITE = ["cluster.gpus_per_node=0", "cluster.time=30"]
# A recipe in all but its work: WORK has `r`, the configuration, `rank` and `directory`.
TINY = """
import os, signal, subprocess, sys, time
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.environment import rank as rank_here
from nemo_minitron.run import main as recipe

class Ready:
    def to_config(self):
        return {}

def run(r, prepared, directory):
    rank = rank_here()
    WORK
    return {"seed": r.prune.seed, "ranks": int(os.environ["WORLD_SIZE"])}

recipe.main("prune", PruneRecipe, lambda r: Ready(), run)
"""


@dataclass(frozen=True)
class Slurm:
    """The cluster and a user of it."""

    environment: dict[str, str]
    home: Path

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """launchers/slurm.sh with these arguments, to its end."""
        return subprocess.run(
            [str(ROOT / "launchers" / "slurm.sh"), *map(str, arguments)],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ... as SLURM remembers it."""
        return self.shown(job)["JobState"]

    def shown(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        pairs = (word.partition("=") for word in self.ask("scontrol", "-o", "show", "job", job).split())
        return {key: value for key, _, value in pairs}

    def wait(self, job: str, reached: Callable[[], bool], seconds: float = 240) -> None:
        """Until `reached`, which has to be while the job has not ended."""
        give_up = time.monotonic() + seconds
        while not reached():
            shown = self.shown(job)
            assert shown["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), shown
            assert time.monotonic() < give_up, shown
            time.sleep(0.2)

    def end(self, job: str, seconds: float = 300) -> str:
        """The state in which a job ended."""
        give_up = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < give_up, self.shown(job)
            time.sleep(0.2)
        return state

    def tiny(self, name: str, work: str) -> Path:
        """A recipe that does this on every rank."""
        path = self.home / f"{name}.py"
        path.write_text(TINY.replace("WORK", work.replace("\n", "\n    ")))
        return path


def log(run_dir: Path, job: str) -> str:
    """What a job printed."""
    return (run_dir / "logs" / f"slurm-{job}.log").read_text()


def result(run_dir: Path) -> dict[str, object]:
    """The result of a run that has ended well."""
    return json.loads((run_dir / "result.json").read_text())


@contextmanager
def loopback(commands: Commands) -> Iterator[Slurm]:
    """The cluster, while the tests run; they are skipped where it cannot be had, but for CI."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # munge's socket wants a short path
    try:
        variables = slurm_on_loopback.start(directory / "c")
    except slurm_on_loopback.UnavailableError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but there is no SLURM: {error}")
        pytest.skip(f"no SLURM: {error}")
    try:
        yield Slurm(commands.environment(**variables), commands.home)
    finally:
        slurm_on_loopback.stop(directory / "c")
        shutil.rmtree(directory, ignore_errors=True)
