"""Runs a recipe on several ranks of this machine: `launchers/local.sh --nproc N recipes/X.py overrides...`.

Two phases, so that all ranks share one configuration and one run directory:

1. One process composes and checks the configuration (`NEMO_MINITRON_PREPARE=1`, `NEMO_MINITRON_NPROC=ranks`),
   prepares what the ranks need, writes RUN/resolved.yaml and prints RUN as its last line.
2. The ranks run `recipes/X.py --config-path RUN --config-name resolved hydra.run.dir=RUN` under torch's
   elastic agent, as torchrun does. Rank 0's output is shown; RUN/logs/ holds every rank's.

Exit code: the preparation's, else that of the rank that failed first; 128 + N for one that died of signal N; 75 when
training was told to end (SIGTERM, SIGUSR1) and has saved a checkpoint. SIGINT, SIGTERM and SIGUSR1 go to the ranks;
NEMO_MINITRON_GRACE_S seconds (60) after the first two, or at the second of them, whatever still runs is killed. A rank
that is stopped (SIGSTOP) while another runs is named and killed after NEMO_MINITRON_STOPPED_S seconds (30). No process
is left behind.

Several machines: `--prepare-only` on one, then on each `--prepared RUN --nnodes N --node-rank R
--rdzv-endpoint HOST:PORT`, HOST being the first one's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launchers.stopped import StoppedRanks  # noqa: E402
from nemo_minitron import scratch  # noqa: E402
from nemo_minitron.environment import (  # noqa: E402
    GRACE_S,
    INTERRUPTED,
    LAUNCHED_BY,
    NPROC,
    PREPARE,
    with_package,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TAIL_LINES = 30
AFTER_FAILURE_S = 10  # from SIGTERM to SIGKILL for the ranks that are left when one has failed


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(2, f"launchers/local.sh: {message} (--help explains)\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The launcher's own options, the recipe and its overrides; bad ones end it with exit code 2."""
    parser = Parser(
        prog="launchers/local.sh",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="ranks on this machine")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="which of them this one is")
    parser.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="where the machines meet")
    parser.add_argument("--prepare-only", action="store_true", help="print the run directory, start no ranks")
    parser.add_argument("--prepared", type=Path, metavar="RUN", help="a run directory from --prepare-only")
    parser.add_argument("recipe", type=Path, help="recipes/X.py")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="of its configuration, as Hydra takes them"
    )
    options = parser.parse_args(arguments)
    if problem := complaint(options):
        parser.error(problem)
    return options


def complaint(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything."""
    if options.nproc < 1 or options.nnodes < 1:
        return f"--nproc {options.nproc} --nnodes {options.nnodes}: both must be at least 1"
    if not 0 <= options.node_rank < options.nnodes:
        return f"--node-rank {options.node_rank}: must be in 0..{options.nnodes - 1}"
    if not options.recipe.is_file():
        return f"{options.recipe}: no such recipe; options of the launcher come before it"
    if {"-m", "--multirun"} & set(options.overrides):
        return "-m: a sweep runs one job after another without this launcher; give it one configuration"
    if options.prepared and options.overrides:
        return f"--prepared {options.prepared}: its configuration is fixed, no overrides are taken"
    if options.nnodes > 1 and not options.prepare_only and not (options.prepared and options.rdzv_endpoint):
        return f"--nnodes {options.nnodes}: needs --prepared RUN and --rdzv-endpoint HOST:PORT"
    return None


class Launcher:
    """One launch: whom a signal goes to at the moment, and until when the ranks may take to end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.grace_s = float(os.environ.get(GRACE_S, "60"))
        self.deadline: float | None = None
        self.process: subprocess.Popen[Any] | None = None
        self.state: Path | None = None
        self.stopped = StoppedRanks(others=options.nnodes > 1)

    def run(self) -> int:
        """Both phases, or the one that was asked for; returns the exit code."""
        adopt_orphans()
        for number in SIGNALS:
            signal.signal(number, self.on_signal)
        try:
            return self.phases()
        finally:
            kill_descendants()

    def phases(self) -> int:
        """What `run` runs."""
        run = self.options.prepared
        if run is None:
            code, line = self.prepare()
            if code:
                return code
            if not line:
                return fail(f"{self.options.recipe} printed no run directory")
            run = Path(line)
        if not (run / "resolved.yaml").is_file():
            return fail(f"{run}: holds no resolved.yaml, so {self.options.recipe} did not prepare it")
        if self.options.prepare_only:
            print(run)
            return 0
        with scratch.directory("ranks") as state:
            return self.run_ranks(run.resolve(), state)

    def on_signal(self, number: int, _frame: object) -> None:
        """Passes a signal on; the first that asks for the end sets the deadline, a second ends it now."""
        if number != signal.SIGUSR1:
            self.deadline = time.monotonic() + (self.grace_s if self.deadline is None else 0)
        if self.process is None or self.process.returncode is not None:
            sys.exit(128 + number)
        ranks = self.ranks().values()
        if self.state is None:
            os.killpg(self.process.pid, number)
        elif len(ranks) < self.options.nproc:  # still starting: there is nothing to keep
            self.process.terminate()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ranks(self) -> dict[int, int]:
        """The process ids of this machine's ranks that have started, by rank."""
        return (
            {int(file.stem): int(file.read_text()) for file in self.state.glob("*.pid")} if self.state else {}
        )

    def wait(self) -> int:
        """Waits for the current process, kills it after the deadline; its exit code as a shell gives it."""
        assert self.process is not None
        while self.process.poll() is None:
            if self.deadline is not None and time.monotonic() > self.deadline:
                print("launchers/local.sh: killed what had not ended in time", file=sys.stderr)
                self.process.kill()
            self.stopped.look(self.ranks())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.2)
        return shell_code(self.process.returncode)

    def prepare(self) -> tuple[int, str]:
        """Phase 1: the recipe composes and checks in one process.

        Returns:
            its exit code and its last line on stdout; the lines before that go to stderr.
        """
        env = self.environment()
        env |= {PREPARE: "1", LAUNCHED_BY: str(os.getpid())}
        command = [sys.executable, str(self.options.recipe), *self.options.overrides]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        lines: list[str] = []
        reader = threading.Thread(target=collect, args=(self.process.stdout, lines), daemon=True)
        reader.start()
        code = self.wait()
        reader.join(timeout=5)
        return code, lines[-1].strip() if lines else ""

    def environment(self) -> dict[str, str]:
        """The environment of both phases, without what an enclosing launcher says about its own ranks."""
        foreign = {
            "RANK",
            "LOCAL_RANK",
            "GROUP_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        }
        env = {name: value for name, value in with_package().items() if name not in foreign}
        env.pop(PREPARE, None)
        env[NPROC] = str(self.options.nproc * self.options.nnodes)
        return env

    def run_ranks(self, run: Path, state: Path) -> int:
        """Phase 2: the ranks; returns the exit code of the one that failed first, 0 if none did."""
        logs = run / "logs"
        logs.mkdir(exist_ok=True)
        first = self.options.node_rank * self.options.nproc
        for rank in range(first, first + self.options.nproc):
            for stream in ("stdout", "stderr"):
                (logs / f"rank{rank}.{stream}.log").unlink(missing_ok=True)
        if self.options.nproc > available_cores():
            line = f"{self.options.nproc} ranks share {available_cores()} cores and will wait for each other"
            print(f"launchers/local.sh: warning: {line}", file=sys.stderr)
        env = self.environment()
        env["PYTHONUNBUFFERED"] = "1"  # a log is worth most when its rank was killed
        env.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // self.options.nproc)))
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(AFTER_FAILURE_S))
        agent_log = logs / f"agent{self.options.node_rank}.log"
        with shown(logs if first == 0 else None), open(agent_log, "w") as log:
            self.state = state
            command = [sys.executable, str(ROOT / "launchers" / "agent.py"), json.dumps(self.job(run, logs))]
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            code = self.wait()
            kill_descendants()  # before the logs are shown to their end
        return report(state, logs, agent_log, code)

    def job(self, run: Path, logs: Path) -> dict[str, Any]:
        """What launchers/agent.py needs to know."""
        options = self.options
        return {
            "nproc": options.nproc,
            "nnodes": options.nnodes,
            "node_rank": options.node_rank,
            "rdzv_endpoint": options.rdzv_endpoint,
            "logs": str(logs),
            "state": str(self.state),
            "launcher_pid": os.getpid(),
            "command": [sys.executable, str(options.recipe.resolve()), *resolved(run)],
        }


def resolved(run: Path) -> list[str]:
    """The arguments that make a recipe take the configuration that phase 1 wrote; quoted as Hydra quotes."""
    quoted = str(run).replace("'", "\\'")
    return ["--config-path", str(run), "--config-name", "resolved", f"hydra.run.dir='{quoted}'"]


def fail(message: str) -> int:
    """Says what went wrong; returns exit code 1."""
    print(f"launchers/local.sh: {message}", file=sys.stderr)
    return 1


def shell_code(code: int) -> int:
    """A process's return code as a shell gives it: 128 + N for signal N."""
    return 128 - code if code < 0 else code


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect(stream: Any, lines: list[str]) -> None:
    """Reads lines as they come; each goes to stderr once it is known not to be the last."""
    for line in stream:
        if lines:
            print(lines[-1], end="", file=sys.stderr, flush=True)
        lines[:] = [line]


@contextlib.contextmanager
def shown(logs: Path | None) -> Iterator[None]:
    """Shows rank 0's two logs while they grow, and their rest at the end; None: it runs elsewhere."""
    if logs is None:
        yield
        return
    ended = threading.Event()

    def follow() -> None:
        positions = {1: 0, 2: 0}
        while True:
            last = ended.is_set()
            for descriptor, stream in ((1, "stdout"), (2, "stderr")):
                with contextlib.suppress(FileNotFoundError, BrokenPipeError):
                    with open(logs / f"rank0.{stream}.log", "rb") as file:
                        file.seek(positions[descriptor])
                        text = file.read()
                    positions[descriptor] += len(text)
                    while text:
                        text = text[os.write(descriptor, text) :]
            if last:
                return
            ended.wait(0.1)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def report(state: Path, logs: Path, agent_log: Path, code: int) -> int:
    """Names the rank that failed first, shows the end of its stderr, and returns its exit code."""
    file = state / "failure.json"
    if not file.exists():
        if code in (0, *(128 + number for number in (*SIGNALS, signal.SIGKILL))):
            return code
        return fail(f"the ranks could not be started:\n{tail(agent_log)}")
    failure = json.loads(file.read_text())
    rank, code = failure["rank"], shell_code(failure["code"])
    if code in (INTERRUPTED, 128 + signal.SIGINT):  # rank 0 has said so
        return code
    if rank != 0:  # rank 0's was shown all along
        stderr = logs / f"rank{rank}.stderr.log"
        print(f"--- the end of {stderr}:\n{tail(stderr)}\n---", file=sys.stderr)
    fail(f"rank {rank} failed with exit code {code}; the logs of all ranks: {logs}")
    return code


def tail(path: Path) -> str:
    """The last lines of a file, empty if there is none."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if path.exists() else ""


def adopt_orphans() -> None:
    """Makes processes whose parent ends this process's children, so that none gets away (Linux)."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def children() -> list[int]:
    """The process ids of this process's children, adopted ones included (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid():
                found.append(int(stat.parent.name))
    return found


def kill_descendants() -> None:
    """Kills and reaps all that descend from this process; a killed one's children are adopted in turn."""
    give_up = time.monotonic() + 10
    while (left := children()) and time.monotonic() < give_up:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(Launcher(parse(sys.argv[1:])).run())
