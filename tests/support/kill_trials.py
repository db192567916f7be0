"""SIGKILL of a random rank at a random moment, again and again: the next run has to end as an undisturbed one.

    python -m tests.support.kill_trials 20 [FIRST_SEED]    # from the repository's root; a JSON line a trial

A trial is given by its seed: the recipe, the rank and the share of the undisturbed run's time after which it dies.
docs/clusters.md has a record.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import conversations
from tests.support.commands import ROOT, Commands

NPROC = 2
# What a result and a step's line hold beside what the run is to be judged by.
MEASURED = (
    *("wall_s", "peak_rss_gib", "rss_gib_before_models", "peak_cuda_gib", "checkpoint", "teacher_schedule_s"),
    *("step_time", "validation_step_time", "seconds", "tokens_per_s"),
)
# Later the run may be done before the kill comes.
LATEST = 0.95


@dataclass(frozen=True)
class Subject:
    """A recipe to be killed: its overrides but for `run_dir`, and what has to be the same in the end."""

    recipe: str
    overrides: list[str]
    outcome: Callable[[Path], Any]


@dataclass(frozen=True)
class Undisturbed:
    """What a subject comes to, and the seconds from the first rank's start to the end."""

    outcome: Any
    seconds: float


def fields(run_dir: Path) -> dict[str, Any]:
    """The result without what differs from run to run."""
    return unmeasured((run_dir / "result.json").read_text())


def unmeasured(text: str) -> dict[str, Any]:
    """A JSON object without the measurements."""
    return {key: value for key, value in json.loads(text).items() if key not in MEASURED}


def pruned(run_dir: Path) -> Any:
    """The result and the plan of a pruning run."""
    return fields(run_dir), json.loads((run_dir / "plan.json").read_text())


def trained(run_dir: Path) -> Any:
    """The result and every step's losses; the teacher's is written each time that it is loaded."""
    lines = map(unmeasured, (run_dir / "steps.jsonl").read_text().splitlines())
    return fields(run_dir), {f"{line['split']} {line['step']}": line for line in lines}


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Process ids of the recipe's live ranks by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if str(run_dir).encode() in command and b"resolved" in command and b"python" in command[0]:
                said = (process / "environ").read_bytes().split(b"\0")
                rank = next(line for line in said if line.startswith(b"RANK=")).partition(b"=")[2]
                if not any(line == b"NEMO_MINITRON_PREPARE=1" for line in said):
                    found[int(rank)] = int(process.name)
    return found


def start(commands: Commands, subject: Subject, run_dir: Path) -> "subprocess.Popen[bytes]":
    """The launcher with its ranks; what it prints goes to RUN.log."""
    command = commands.command(subject.recipe, *subject.overrides, f"run_dir={run_dir}", nproc=NPROC)
    with open(f"{run_dir}.log", "ab") as log:
        return subprocess.Popen(
            command, env=commands.environment(), cwd=commands.home, stdout=log, stderr=log
        )


def wait_for_ranks(process: "subprocess.Popen[bytes]", run_dir: Path) -> dict[int, int]:
    """Until all have started; empty if the run ended before."""
    while process.poll() is None:
        ranks = ranks_of(run_dir)
        if len(ranks) == NPROC:
            return ranks
        time.sleep(0.05)
    return {}


def undisturbed(commands: Commands, subject: Subject, run_dir: Path) -> Undisturbed:
    """The run that all trials are compared with."""
    process = start(commands, subject, run_dir)
    assert wait_for_ranks(process, run_dir), Path(f"{run_dir}.log").read_text()[-3000:]
    begin = time.monotonic()
    assert process.wait(timeout=600) == 0, Path(f"{run_dir}.log").read_text()[-3000:]
    return Undisturbed(subject.outcome(run_dir), time.monotonic() - begin)


def kill(commands: Commands, subject: Subject, run_dir: Path, rank: int, after_s: float) -> str | None:
    """Run until one rank dies by SIGKILL; what was in the run directory then, or None if the run was done before."""
    process = start(commands, subject, run_dir)
    ranks = wait_for_ranks(process, run_dir)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=after_s)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], signal.SIGKILL)
    # The other ranks must not wait for a collective's time-out.
    code = process.wait(timeout=60)
    assert not ranks_of(run_dir)
    # Between its result and its end a rank may still be killed; there is nothing to go on with then.
    if code == 0 or (run_dir / "result.json").exists():
        return None
    assert code == 128 + signal.SIGKILL, (code, Path(f"{run_dir}.log").read_text()[-3000:])
    return ", ".join(sorted(path.name for path in run_dir.iterdir() if path.suffix != ".log"))


def trial(commands: Commands, subject: Subject, expected: Undisturbed, seed: int) -> dict[str, Any]:
    """One kill, one more run, and the comparison.

    Returns:
        What is to be recorded; `same` is the verdict.
    """
    draw = random.Random(seed)
    rank, share = draw.randrange(NPROC), LATEST * draw.random()
    run_dir = commands.home / f"trial-{subject.recipe}-{seed}"
    after_s = share * expected.seconds
    record = {"seed": seed, "recipe": subject.recipe, "rank": rank, "share": round(share, 3)}
    found = kill(commands, subject, run_dir, rank, after_s)
    if found is None:
        return {**record, "killed": False, "same": subject.outcome(run_dir) == expected.outcome}
    code = start(commands, subject, run_dir).wait(timeout=600)
    same = code == 0 and subject.outcome(run_dir) == expected.outcome
    return {**record, "killed": True, "after_s": round(after_s, 1), "held": found, "code": code, "same": same}


def distilling(commands: Commands, student: Path, teacher: Path, steps: int) -> Subject:
    """Distillation on two tensor-parallel ranks, with a checkpoint every 5 steps."""
    own = [
        f"student={student}",
        f"teacher={teacher}",
        "trainer.tensor_model_parallel_size=2",
        f"distill.max_steps={steps}",
        "distill.val_check_interval=5",
        "distill.limit_val_batches=1",
        "distill.optim.warmup_steps=1",
    ]
    return Subject("distill", ["+conf=width", *commands.data(), *own], trained)


def pruning(commands: Commands, teacher: Path) -> Subject:
    """Width pruning on two tensor-parallel ranks."""
    own = [f"source={teacher}", "trainer.tensor_model_parallel_size=2", "prune.calibration_samples=32"]
    return Subject("prune", ["+conf=width", *commands.data(), *own], pruned)


def tuning(commands: Commands, student: Path, steps: int) -> Subject:
    """Supervised fine-tuning on two tensor-parallel ranks, with a checkpoint every 5 steps."""
    files = {
        name: conversations.conversations(commands.home / "kill-trials" / f"{name}.jsonl", numbers)
        for name, numbers in (("train", range(40)), ("valid", range(100, 108)))
    }
    own = [
        f"student={student}",
        *(f"align.{name}={path}" for name, path in files.items()),
        "trainer.tensor_model_parallel_size=2",
        f"align.max_steps={steps}",
        f"align.max_epochs={steps}",
        "align.val_check_interval=5",
        "align.optim.warmup_steps=1",
    ]
    return Subject("sft", ["+conf=instruct", *commands.data(), *own], trained)


def main(trials: int, first_seed: int) -> int:
    """Trials until so many were killed, in turn on each recipe; 1 if one of them ended differently."""
    home = Path(tempfile.mkdtemp(prefix="kill-trials-"))
    commands = Commands(home, home / "cache")
    teacher, student = commands.home / "teacher-hf", commands.home / "student"
    commands.pretrain(commands.home / "teacher", "trainer.max_steps=10", f"export_dir={teacher}").result()
    commands.prune(teacher, student).result()
    subjects = [
        pruning(commands, teacher),
        distilling(commands, student, teacher, steps=20),
        tuning(commands, student, steps=20),
    ]
    expected = [undisturbed(commands, s, commands.home / f"undisturbed-{s.recipe}") for s in subjects]
    killed, seed, wrong = 0, first_seed, 0
    while killed < trials:
        which = seed % len(subjects)
        record = trial(commands, subjects[which], expected[which], seed)
        print(json.dumps(record), flush=True)
        killed += record["killed"]
        wrong += not record["same"]
        seed += 1
    print(json.dumps({"killed": killed, "different": wrong, "home": str(commands.home)}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    assert Path.cwd() == ROOT, f"run it from {ROOT}"
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
