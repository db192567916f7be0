"""One run at a time in a run directory: a lock that ends with the process that holds it, however it ends."""

import fcntl
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import IO

from nemo_minitron.errors import InputError
from nemo_minitron.run.terminal import short

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


def check_writable(directory: Path) -> None:
    """See that a run directory can be made, or be written in where it is there, and leave nothing behind.

    Tried, not asked: to root every directory looks writable, also an immutable one or a read-only file system.

    Raises:
        InputError: names it, with the system's words.
    """
    whole = Path(os.path.abspath(directory))
    try:
        there = next(path for path in (whole / LOCK, whole, *whole.parents) if _exists(path))
        there = there.parent if there.name == LOCK else there
        descriptor, name = tempfile.mkstemp(prefix=".tried-", dir=there)
    except (OSError, ValueError) as error:
        raise _cannot(directory, error) from None
    os.close(descriptor)
    os.unlink(name)


def make(directory: Path) -> None:
    """Make a run directory.

    Raises:
        InputError: names it, with the system's words.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot(directory, error) from None


def _exists(path: Path) -> bool:
    """As a system call says it: `Path.exists` hides a file in the way, and raises for a name that is too long."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _cannot(directory: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(f"run_dir={short(directory)}: cannot be made or written in ({reason})")
