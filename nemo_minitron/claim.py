"""One run at a time in a run directory: a lock that ends with the process that holds it, however it ends."""

import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import IO

from nemo_minitron.errors import InputError

LOCK = ".lock"
# Open until this process ends: closing one would give its lock back.
_held: dict[Path, IO[str]] = {}


def claim(directory: Path) -> None:
    """Take the run directory for this process; the file of a dead one is taken over.

    A POSIX record lock, which forked workers do not inherit and network file systems pass on between machines.

    Raises:
        InputError: names the process that is at work in it.
    """
    path = directory.resolve() / LOCK
    if path in _held:
        return
    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise InputError(f"run_dir={directory}: {owner} is at work in it; choose another run_dir") from None
    except OSError as error:
        print(f"{directory}: no file locks here ({error.strerror})", file=sys.stderr)
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job},' if job else ''}\n")
    file.flush()
    _held[path] = file
