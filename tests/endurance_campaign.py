"""Many tiny steps with a kill now and then: memory, files and open descriptors stay bounded, and nothing is left over.

    python -m tests.endurance_campaign --home DIR [--steps 20000] [--every 500] [--layout one|tp2] [--seed 0]

From the repository's root. A distillation of a student of 14,000 parameters runs once undisturbed; then again with a
SIGKILL after each EVERY steps, while a checkpoint is written or between two, and the same command after it. Printed: a
JSON line a life, and one that judges. It fails beyond the limits below, where the losses differ from the undisturbed
run's, or where a process, a semaphore, shared memory or a temporary file outlives a killed run (temporary files: until
the next run has started). docs/reliability.md has a record.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.commands import ROOT, Commands
from tests.support.kill_trials import ranks_of, unmeasured

SAVE_EVERY = 100
# Before that, memory grows: caches fill, allocators settle. Of an undisturbed run and of a life between two kills.
WARM_STEPS, WARM_LIFE = 2000, 300
# What is not allowed. Memory by a straight line through all samples after the warm-up, of each process.
MIB_PER_1000_STEPS = 1.0
MIB_PER_RESTART = 1.0
DESCRIPTORS_PER_1000_STEPS = 1.0
MORE_FILES = 4  # than in the first life, at the most
MORE_BYTES = 1 << 20  # without the logs and the steps' lines, which grow by a line a step
LOG_BYTES_PER_STEP = 2048
LEFT_S = 10
ONE_RUNS_TEMPORARY = 2  # until the next run: the launcher's, and a tokenizer's
SAMPLE_S, PATIENCE_S = 0.25, 1800
TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
}
SHORT = ["data.seq_length=16", "trainer.micro_batch_size=2"]


@dataclass
class Samples:
    """What a process was seen to need: (step, MiB resident, open descriptors)."""

    role: str
    seen: list[tuple[int, float, int]] = field(default_factory=list)

    def slopes(self, after: int) -> tuple[float, float] | None:
        """MiB and descriptors more for each 1,000 steps; None where too little was seen."""
        late = [seen for seen in self.seen if seen[0] >= after]
        if len({step for step, _, _ in late}) < 5:
            return None
        steps, *columns = zip(*late, strict=True)
        mib, descriptors = (statistics.linear_regression(steps, column).slope for column in columns)
        return 1000 * mib, 1000 * descriptors


@dataclass
class Life:
    """One start of the command, to its end or its kill."""

    first: int
    processes: dict[int, Samples] = field(default_factory=dict)
    files: int = 0
    data_bytes: int = 0
    log_bytes: int = 0

    def look(self, pids: list[int], step: int, run_dir: Path) -> None:
        """Take a sample."""
        for pid in pids:
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                resident = next(line for line in status if line.startswith("VmRSS:")).split()[1]
                descriptors = len(os.listdir(f"/proc/{pid}/fd"))
                samples = self.processes.setdefault(pid, Samples(role_of(pid)))
                samples.seen.append((step, int(resident) / 1024, descriptors))
        sizes = sizes_of(run_dir)
        logs = sum(size for name, size in sizes.items() if is_log(name))
        self.files, self.log_bytes = max(self.files, len(sizes)), max(self.log_bytes, logs)
        self.data_bytes = max(self.data_bytes, sum(sizes.values()) - logs)

    def record(self, warm: int) -> dict[str, Any]:
        """What is to be printed; memory and descriptors by the role of a process."""
        slopes, more = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        largest, descriptors = defaultdict[str, float](float), defaultdict[str, int](int)
        for samples in self.processes.values():
            role = samples.role
            largest[role] = max(largest[role], *(mib for _, mib, _ in samples.seen))
            descriptors[role] = max(descriptors[role], *(count for _, _, count in samples.seen))
            if found := samples.slopes(self.first + warm):
                slopes[role].append(round(found[0], 2))
                more[role].append(round(found[1], 2))
        return {
            "first_step": self.first,
            "mib": {role: round(mib, 1) for role, mib in largest.items()},
            "mib_per_1000_steps": {role: max(found, key=abs) for role, found in slopes.items()},
            "descriptors": descriptors,
            "descriptors_per_1000_steps": {role: max(found, key=abs) for role, found in more.items()},
            "files": self.files,
            "data_bytes": self.data_bytes,
            "log_bytes": self.log_bytes,
        }

    def settled_mib(self) -> dict[str, float]:
        """The median of each lasting process after the warm-up."""
        found = {}
        for samples in self.processes.values():
            if late := [mib for step, mib, _ in samples.seen if step >= self.first + WARM_LIFE]:
                found[samples.role] = max(found.get(samples.role, 0.0), statistics.median(late))
        return found


def end(pids: Iterable[int]) -> None:
    """SIGKILL for all of them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def role_of(pid: int) -> str:
    """What a process of a run is: a rank, the launcher, its agent, or what one of them forked."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    with contextlib.suppress(OSError):
        if Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0") == command:
            return "fork"
    for name in (b"resource_tracker", b"spawn_main", b"agent.py", b"local.py", b"local.sh"):
        if any(name in word for word in command):
            return name.decode().partition(".")[0].replace("local", "launcher")
    rank = next((line for line in said if line.startswith(b"RANK=")), b"")
    return f"rank {rank.partition(b'=')[2].decode()}" if rank else "recipe"


def sizes_of(directory: Path) -> dict[str, int]:
    """Bytes of the files below a directory."""
    found = {}
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                found[name if place == str(directory) else f"{place}/{name}"] = os.lstat(
                    f"{place}/{name}"
                ).st_size
    return found


def is_log(name: str) -> bool:
    """Whether a file grows by lines, as a log."""
    return name.endswith((".log", ".txt", ".jsonl"))


def last_step(run_dir: Path) -> int:
    """The number of steps that were done; 0 before the first."""
    with contextlib.suppress(OSError, ValueError), open(run_dir / "steps.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
        return json.loads(whole[-1])["step"] + 1 if whole else 0
    return 0


def losses(run_dir: Path) -> dict[str, Any]:
    """Each step's figures; of a step that was repeated the last."""
    lines = map(unmeasured, (run_dir / "steps.jsonl").read_text().splitlines())
    return {f"{line['split']} {line['step']}": line for line in lines}


class Campaign:
    """The model, the two runs of it and what was seen."""

    def __init__(self, home: Path, steps: int, every: int, layout: str, seed: int) -> None:
        self.home, self.steps, self.every, self.layout = home, steps, every, layout
        self.draw = random.Random(seed)
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        self.commands = Commands(home, home / "cache")
        self.shared = set(os.listdir("/dev/shm"))
        self.faults: list[str] = []

    def models(self) -> list[str]:
        """A teacher and its student, made first: the overrides of the distillation."""
        teacher, student = self.home / "teacher-hf", self.home / "student"
        if not (student / "result.json").exists():
            sizes = [f"model.{name}={value}" for name, value in TINY.items()]
            own = ["trainer.max_steps=200", "trainer.global_batch_size=2", f"export_dir={teacher}"]
            self.commands.pretrain(self.home / "teacher", *sizes, *SHORT, *own).result()
            self.commands.prune(teacher, student, *SHORT).result()
        own = {
            "max_steps": self.steps,
            "val_check_interval": SAVE_EVERY,
            "limit_val_batches": 1,
            "global_batch_size": 2,
            "optim.warmup_steps": 1,
        }
        layout = ["trainer.tensor_model_parallel_size=2"] if self.layout == "tp2" else []
        given = [f"student={student}", f"teacher={teacher}", *(f"distill.{k}={v}" for k, v in own.items())]
        return ["+conf=width", *self.commands.data(), *SHORT, *given, *layout]

    def start(self, overrides: list[str], run_dir: Path) -> "subprocess.Popen[bytes]":
        """What is printed goes to RUN.log; temporary files to a directory of the campaign's own."""
        nproc = 2 if self.layout == "tp2" else None
        command = self.commands.command("distill", *overrides, f"run_dir={run_dir}", nproc=nproc)
        environment = self.commands.environment(TMPDIR=str(self.home / "tmp"))
        with open(f"{run_dir}.log", "ab") as log:
            return subprocess.Popen(command, env=environment, cwd=self.home, stdout=log, stderr=log)

    def live(self, overrides: list[str], run_dir: Path, until: int) -> tuple[Life, int | None]:
        """Run until a step, for ever where it is never reached; the exit code where the run ended before."""
        first = last_step(run_dir) // SAVE_EVERY * SAVE_EVERY
        life, process, looked = Life(first), self.start(overrides, run_dir), 0.0
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            assert time.monotonic() < deadline, f"no end: {run_dir}.log"
            step = last_step(run_dir)
            if step >= until:
                self.kill(process, run_dir)
                return life, None
            if time.monotonic() - looked > SAMPLE_S:
                looked = time.monotonic()
                life.look(list(self.commands.processes()), step, run_dir)
            time.sleep(0.005)
        return life, process.returncode

    def kill(self, process: "subprocess.Popen[bytes]", run_dir: Path) -> None:
        """SIGKILL, of one process alone: whatever it started has to end by itself."""
        time.sleep(self.draw.choice([0, 0.01, 0.03, 0.06]))
        victims = [process.pid, *ranks_of(run_dir).values()]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.draw.choice(victims), signal.SIGKILL)
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LEFT_S)
        while (left := self.commands.processes()) and time.monotonic() - began < LEFT_S:
            time.sleep(0.02)
        self.ended_s = round(time.monotonic() - began, 2)
        if left:
            self.faults.append(f"left after {LEFT_S} s: {left}")
            end(left)
            process.wait()

    def shared_left(self) -> list[str]:
        """New entries of /dev/shm that no process has mapped: another user's of the machine are in use."""
        new = set(os.listdir("/dev/shm")) - self.shared
        mapped = ""
        for process in Path("/proc").glob("[0-9]*/maps") if new else ():
            with contextlib.suppress(OSError):
                mapped += process.read_text()
        return sorted(name for name in new if f"/dev/shm/{name}" not in mapped)

    def temporary(self) -> list[str]:
        """What lies in the campaign's own directory for temporary files."""
        # torch's compiler keeps what it compiled, for all runs of a user.
        return sorted(name for name in os.listdir(self.home / "tmp") if not name.startswith("torchinductor_"))

    def undisturbed(self, overrides: list[str]) -> dict[str, Any]:
        """The run that nobody kills."""
        run_dir = self.home / f"undisturbed-{self.layout}"
        life, code = self.live(overrides, run_dir, until=sys.maxsize)
        assert code == 0, Path(f"{run_dir}.log").read_text()[-3000:]
        record = life.record(min(WARM_STEPS, self.steps // 2))
        if self.steps >= 2 * WARM_STEPS:  # a shorter run's figures are of its beginning, and no verdict
            self.hold("MiB, undisturbed", record["mib_per_1000_steps"], MIB_PER_1000_STEPS)
            self.hold("descriptors", record["descriptors_per_1000_steps"], DESCRIPTORS_PER_1000_STEPS)
        if left := self.temporary():
            self.faults.append(f"an undisturbed run left in TMPDIR: {left}")
        print(json.dumps({"run": "undisturbed", **record}), flush=True)
        return losses(run_dir)

    def killed(self, overrides: list[str]) -> list[Life]:
        """The run with a kill each so many steps: its lives."""
        run_dir, lives, code = self.home / f"killed-{self.layout}", list[Life](), None
        while code is None:
            at = (len(lives) + 1) * self.every + self.draw.choice([0, 0, self.draw.randrange(SAVE_EVERY)])
            life, code = self.live(overrides, run_dir, at if at < self.steps else sys.maxsize)
            lives.append(life)
            record = {"life": len(lives), "code": code, "ended_s": self.ended_s, **life.record(WARM_LIFE)}
            print(json.dumps({**record, "tmp": self.temporary(), "shm": self.shared_left()}), flush=True)
            if len(self.temporary()) > (ONE_RUNS_TEMPORARY if code is None else 0):
                self.faults.append(f"life {len(lives)}: TMPDIR holds {self.temporary()}")
        if code:
            self.faults.append(f"exit code {code}: {Path(f'{run_dir}.log').read_text()[-1000:]}")
        return lives

    def hold(self, what: str, found: dict[str, float], limit: float) -> None:
        """Note what is beyond a limit."""
        self.faults += [f"{what}, {role}: {value}" for role, value in found.items() if value > limit]

    def judge(self, expected: dict[str, Any], lives: list[Life]) -> dict[str, Any]:
        """What is to be recorded of the killed run as a whole."""
        settled = defaultdict[str, list[float]](list)
        for life in lives:
            for role, mib in life.settled_mib().items():
                if role != "fork":  # each lives for one checkpoint, and is seen at any moment of it
                    settled[role].append(mib)
        slopes = {
            role: round(statistics.linear_regression(range(len(found)), found).slope, 3)
            for role, found in settled.items()
            if len(found) > 2
        }
        self.hold("MiB from restart to restart", slopes, MIB_PER_RESTART)
        # The second's begins with what a kill left; the first had none.
        early, files = max(life.files for life in lives[:3]), max(life.files for life in lives)
        size, first = max(life.data_bytes for life in lives), max(life.data_bytes for life in lives[:3])
        if files > early + MORE_FILES or size > first + MORE_BYTES:
            self.faults.append(f"files {early} -> {files}, bytes {first} -> {size}")
        if (log := max(life.log_bytes for life in lives)) > LOG_BYTES_PER_STEP * self.steps:
            self.faults.append(f"logs of {log} bytes after {self.steps} steps")
        if left := self.shared_left():
            self.faults.append(f"/dev/shm: {left}")
        found = losses(self.home / f"killed-{self.layout}")
        if found != expected:
            differ = [key for key in expected if found.get(key) != expected[key]]
            self.faults.append(f"{len(differ)} steps differ, first {differ[:3]}")
        return {"mib_per_restart": slopes, "files": files, "data_bytes": size, "log_bytes": log}

    def run(self) -> dict[str, Any]:
        """Both runs: the last line."""
        self.ended_s = 0.0
        overrides = self.models()
        lives = self.killed(overrides) if (expected := self.undisturbed(overrides)) else []
        record = self.judge(expected, lives)
        return {"steps": self.steps, "layout": self.layout, "kills": len(lives) - 1, **record}


def main() -> int:
    """Run it; 1 if something was beyond its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True, help="a new directory")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=500, help="steps from kill to kill")
    parser.add_argument("--layout", choices=("one", "tp2"), default="one")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    options = parser.parse_args()
    assert Path.cwd() == ROOT, f"run it from {ROOT}"
    home = options.home.absolute()
    assert not (home / f"killed-{options.layout}").exists(), f"{home} holds an earlier campaign's runs"
    begin = time.monotonic()
    campaign = Campaign(home, options.steps, options.every, options.layout, options.seed)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        record = campaign.run()
    finally:
        end(campaign.commands.processes())
    minutes = round((time.monotonic() - begin) / 60, 1)
    print(json.dumps({**record, "seed": options.seed, "minutes": minutes, "faults": campaign.faults}))
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
