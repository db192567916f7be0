"""One rank of a SLURM job, as srun starts it: slurm_rank.py RUN RECORD COMMAND...

The command gets the variables that torchrun sets, so that a recipe runs under srun as it does under
launchers/local.sh; rank 0's output is the job's, RUN/logs/ holds the others'. At SLURM's own variables Lightning would
start its requeueing, which saves in the middle of whatever a rank is doing.

SLURM says that the end is near with SIGUSR1 (ahead of the time limit) or SIGTERM (preemption, scancel), at which
training saves a checkpoint and ends with exit code 75. proctrack/cgroup signals the task alone, which is this process,
so they are passed on. The first rank that fails leaves its number and exit code in RECORD, a file that only this
attempt writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers.stopped import StoppedRanks

SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


def environment() -> dict[str, str]:
    """What torchrun would say, out of what srun says."""
    given = dict(os.environ)
    said = {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_NTASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": given["SLURM_NTASKS_PER_NODE"],
        "GROUP_RANK": given["SLURM_NODEID"],
        "TORCHELASTIC_RUN_ID": given["SLURM_JOB_ID"],
        "PYTHONUNBUFFERED": "1",  # a log is worth most when its rank was killed
    }
    hidden = {"SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID"}
    return {**{name: value for name, value in given.items() if name not in hidden}, **said}


def unblocked() -> None:
    """The command, before it is executed: takes signals, and ends with this process, which cannot pass on SIGKILL."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def output(run: Path, rank: str) -> tuple[IO[bytes] | None, IO[bytes] | None]:
    """Where stdout and stderr go; None: to the job's log."""
    if rank == "0":
        return None, None
    logs = run / "logs"
    return open(logs / f"rank{rank}.stdout.log", "ab"), open(logs / f"rank{rank}.stderr.log", "ab")


def wait(process: subprocess.Popen[bytes], rank: int) -> int:
    """For the end of the command; its return code. SLURM suspends a job with this process in it."""
    stopped = StoppedRanks(others=True)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        stopped.look({rank: process.pid})


def main(run: Path, record: Path, command: list[str]) -> int:
    """Runs the command to its end; its exit code as a shell gives it."""
    env = environment()
    stdout, stderr = output(run, env["RANK"])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to pass them on to
    process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, preexec_fn=unblocked)
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: process.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = wait(process, int(env["RANK"]))
    code = 128 - code if code < 0 else code
    if code:
        with contextlib.suppress(FileExistsError), open(record, "x") as file:
            file.write(f"{env['RANK']} {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
