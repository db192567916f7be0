"""Temporary directories that no kill leaves behind for good.

SIGKILL leaves a process no time to remove one, so whoever makes the next removes those whose process has died: each is
locked by its own for as long as that lives. Only the standard library is imported: launchers/ use it too.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def directory(kind: str) -> Iterator[Path]:
    """A new directory in the system's place for temporary ones, until the block ends."""
    path, lock = _make(kind)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def lasting(kind: str) -> Path:
    """A new directory in the system's place for temporary ones, for as long as this process lives."""
    path, _ = _make(kind)
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not in what is forked from it
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


def _make(kind: str) -> tuple[Path, int]:
    # Of this machine: a lock may not be seen from another one that shares the place.
    prefix = f"nemo_minitron-{kind}-{socket.gethostname()}-"
    place = tempfile.gettempdir()
    _remove_abandoned(Path(place), prefix)
    # It gets the name by which others look for it once it is locked.
    made = Path(tempfile.mkdtemp(prefix="nemo_minitron_new-", dir=place))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = made.with_name(prefix + made.name.rpartition("-")[2])
    made.rename(path)
    return path, lock


def _remove_abandoned(place: Path, prefix: str) -> None:
    for found in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            lock = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(lock)
