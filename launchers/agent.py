"""Starts the ranks with torch's elastic agent, the library under torchrun, for launchers/local.py.

torchrun itself ends with exit code 1 whatever a rank's was; its library says which ranks failed, and how.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from nemo_minitron.environment import LAUNCHED_BY

RANK = Path(__file__).resolve().parent / "rank.sh"

PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def launch(job: dict[str, Any], *arguments: str) -> None:
    """Runs bash with these arguments as every rank; on one machine the rendezvous takes a free port itself.

    Raises:
        ChildFailedError: ranks failed.
        SignalException: this process was told to end, and has ended them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone = job["nnodes"] == 1
    config = LaunchConfig(
        min_nodes=job["nnodes"],
        max_nodes=job["nnodes"],
        nproc_per_node=job["nproc"],
        max_restarts=0,
        run_id=uuid.uuid4().hex if alone else "nemo_minitron",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else job["rdzv_endpoint"],
        rdzv_configs={} if alone else {"rank": job["node_rank"]},
        local_addr="localhost" if alone else None,
        # Empty directories, which torch makes in /tmp for good where it is given no place.
        logs_specs=DefaultLogsSpecs(log_dir=f"{job['state']}/torch"),
    )
    # torch substitutes ${local_rank} and the like in what it passes on.
    elastic_launch(config, "/bin/bash")(*(text.replace("$", "$$") for text in arguments))


def started(state: Path, logs: Path) -> list[int]:
    """The process ids of the ranks that have started; first the one that fell silent first."""
    files = sorted(state.glob("*.pid"), key=lambda file: last_word(logs, file.stem))
    return [int(file.read_text()) for file in files]


def last_word(logs: Path, rank: str) -> int:
    """When a rank last wrote to its stderr, in ns; 0 if that is not known."""
    with contextlib.suppress(OSError):
        return (logs / f"rank{rank}.stderr.log").stat().st_mtime_ns
    return 0


def watch(state: Path, logs: Path) -> list[int]:
    """A list that grows by the process id of each rank that ends, in that order.

    The agent looks only every 0.1 s, when the ranks that lost their peer have failed too, and dates failures by
    the second; the first to end is the one with the cause. On a busy machine even this may see both at once: then the
    first is the one that fell silent first. Those that are left when it has failed get SIGTERM from the agent, and here
    SIGKILL after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds, for which the agent waits 30 whatever that says (torch 2.13.0,
    SubprocessContext._poll).
    """
    ended: list[int] = []
    timers: list[threading.Timer] = []

    def kill_the_rest() -> None:
        for pid in started(state, logs):
            with contextlib.suppress(ProcessLookupError):
                if pid not in ended:
                    os.kill(pid, signal.SIGKILL)

    def look(_number: int, _frame: object) -> None:
        for pid in started(state, logs):
            with contextlib.suppress(ChildProcessError):  # WNOWAIT: its exit code stays for the agent
                end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if pid in ended or end is None:
                    continue
                ended.append(pid)
                if end.si_status and not timers:
                    timers.append(threading.Timer(float(os.environ[PATIENCE]), kill_the_rest))
                    timers[0].daemon = True
                    timers[0].start()

    signal.signal(signal.SIGCHLD, look)
    return ended


def main() -> int:
    """Runs the job that the first argument describes, until every rank has ended.

    Returns:
        0, 1 if ranks failed (STATE/failure.json then names the first and its exit code), 128 + N after signal N.
    """
    job = json.loads(sys.argv[1])
    # The ranks end with the launcher, even when it is killed: asked for before torch's import, which takes seconds.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != job["launcher_pid"]:
            return 128 + signal.SIGTERM
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED_BY] = str(os.getpid())
    ended = watch(Path(job["state"]), Path(job["logs"]))
    try:
        launch(job, str(RANK), job["logs"], job["state"], *job["command"])
    except ChildFailedError as error:
        order = {pid: place for place, pid in enumerate(ended)}
        rank, failure = min(error.failures.items(), key=lambda item: order.get(item[1].pid, len(order)))
        Path(job["state"], "failure.json").write_text(json.dumps({"rank": rank, "code": failure.exitcode}))
        return 1
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
