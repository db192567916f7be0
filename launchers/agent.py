"""Starts the ranks with torch's elastic agent, the library under torchrun, for launchers/local.py.

torchrun itself ends with exit code 1 whatever a rank's was; its library says which ranks failed, and how.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().parent / "rank.sh"


def launch(job: dict[str, Any], *arguments: str) -> None:
    """Runs bash with these arguments as every rank; on one machine the rendezvous takes a free port itself.

    Raises:
        ChildFailedError: ranks failed.
        SignalException: this process was told to end, and has ended them.
    """
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
    )
    # torch substitutes ${local_rank} and the like in what it passes on.
    elastic_launch(config, "/bin/bash")(*(text.replace("$", "$$") for text in arguments))


def main() -> int:
    """Runs the job that the first argument describes, until every rank has ended.

    Returns:
        0, 1 if ranks failed (STATE/failures.json then holds each one's exit code), 128 + N after signal N.
    """
    job = json.loads(sys.argv[1])
    # The ranks end with the launcher, even when it is killed: asked for before torch's import, which takes seconds.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != job["launcher_pid"]:
            return 128 + signal.SIGTERM
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch(job, str(RANK), job["logs"], job["state"], *job["command"])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        Path(job["state"], "failures.json").write_text(json.dumps(codes))
        return 1
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
