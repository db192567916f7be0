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
    with _until_the_end(Path(tempfile.gettempdir()), f"nemo_minitron-{kind}-", "") as path:
        yield path


def lasting(kind: str) -> Path:
    """A new directory in the system's place for temporary ones, for as long as this process lives."""
    path, _ = _make(Path(tempfile.gettempdir()), f"nemo_minitron-{kind}-", "")
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not in what is forked from it
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


@contextlib.contextmanager
def beside(final: Path) -> Iterator[Path]:
    """A path on the disk of `final`, and of its name, to make it at; what is there when the block ends is removed."""
    with _until_the_end(final.parent, f".{final.name[:100]}.", ".tmp") as path:
        yield path / final.name


@contextlib.contextmanager
def _until_the_end(place: Path, prefix: str, suffix: str) -> Iterator[Path]:
    path, lock = _make(place, prefix, suffix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make(place: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    # Of this machine: a lock may not be seen from another one that shares the place.
    prefix += f"{socket.gethostname()[:64]}-"
    _remove_abandoned(place, prefix, suffix)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=place))
        if (lock := _locked(path)) is not None:
            return path, lock


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another process took the new directory for an abandoned one."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        return lock  # no locks here: nobody removes what others left either
    if path.exists():
        return lock
    os.close(lock)
    return None


def _remove_abandoned(place: Path, prefix: str, suffix: str) -> None:
    for name in os.listdir(place):
        if name.startswith(prefix) and name.endswith(suffix):
            with contextlib.suppress(OSError):
                lock = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    if os.fstat(lock).st_uid == os.getuid():
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(place / name, ignore_errors=True)
                finally:
                    os.close(lock)
