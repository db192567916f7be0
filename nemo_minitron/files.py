"""Files: what a user or a checkpoint names is read with limits, what is written is there as a whole or not at all.

Opened are regular files only, and none larger than what it is read for.

A pipe would block for ever, a device has no end, and a file of gigabytes where a few kilobytes of JSON belong would
fill the memory. What is refused is refused as the operating system does it, with an OSError, so that those who read say
which setting named the file.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nemo_minitron import scratch
from nemo_minitron.environment import rank

# JSON and YAML that is read as a whole; Python objects take about twenty times the bytes.
LARGEST_TEXT = 64 << 20
# One line of a JSONL file, or a document.
LONGEST_LINE = 128 << 20
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def open_regular(path: str | os.PathLike[str], largest: int | None = None) -> BinaryIO:
    """A file, opened to read bytes.

    Args:
        path: of the file, or of a link to it.
        largest: how many bytes it may have; None: any.

    Raises:
        OSError: as `open`; no regular file; a larger one.
    """
    # Without O_NONBLOCK a pipe that nobody writes into is waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            raise OSError(errno.EINVAL, f"{kind}, must be a regular file", str(path))
        if largest is not None and found.st_size > largest:
            raise OSError(
                errno.EFBIG, f"{found.st_size:,} bytes; at most {largest:,} are read here", str(path)
            )
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], largest: int | None = None) -> None:
    """What `open_regular` refuses, for a library that opens the file by its name."""
    open_regular(path, largest).close()


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST_TEXT) -> bytes:
    """A whole file.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path, largest) as file:
        return file.read(largest)


def read_text(path: str | os.PathLike[str], largest: int = LARGEST_TEXT) -> str:
    """A whole file, as UTF-8.

    Raises:
        OSError: as `open_regular`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, largest).decode("utf-8")


def lines(path: str | os.PathLike[str], longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """Its lines, ends included: of bytes, since a U+2028 inside a JSON string is no line end.

    Raises:
        OSError: as `open_regular`; a line of more than `longest` bytes.
    """
    with open_regular(path) as file:
        yield from lines_of(file, str(path), longest)


def lines_of(file: BinaryIO, name: str, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """As `lines`, of an open file; `name`: for errors."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise OSError(
                errno.EFBIG, f"line {number} has more than {longest:,} bytes, the most that is read", name
            )
        yield line


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a tokenizer's directory of whose files one cannot be read whole, before a library opens them.

    Raises:
        OSError: as `open_regular`.
    """
    for file in present(directory, _TOKENIZER):
        check_regular(file, LARGEST_TEXT)


def present(directory: Path, names: Iterable[str]) -> Iterator[Path]:
    """Those of some names that are there, as whatever: also a link that leads nowhere."""
    return (directory / name for name in names if os.path.lexists(directory / name))


def obstacle(directory: Path) -> Path | None:
    """What keeps a directory from being written to, or made: the last part of its path that is there; None if nothing
    does."""
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return None if place.is_dir() and os.access(place, os.W_OK) else place


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a regular file's bytes."""
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A path beside `final` to write a file or a directory at.

    It is synced and gets the name `final` when the block ends well, and is removed when it does not, or by the next who
    makes the same where a kill came. A file there is replaced; a directory is replaced only where it is empty, as the
    operating system does it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with scratch.beside(final) as temporary:
        yield temporary
        put(temporary, final)


@contextmanager
def making_once(final: Path) -> Iterator[Path]:
    """As `replacing`, for a directory of a cache: one that another process has made meanwhile stays, it is the same."""
    try:
        with replacing(final) as temporary:
            yield temporary
    except OSError:
        if not final.is_dir():
            raise


def put(temporary: Path, final: Path) -> None:
    """Give a finished file or directory its name; it is on the disk before it has it."""
    if temporary.is_dir():
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                sync(file)
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 that is there as a whole, or as it was before; returns the path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it; nothing if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as it is typed, with ~; where there is no such user, `Path.expanduser` raises a RuntimeError."""
    return Path(os.path.expanduser(path))


def real(path: str | os.PathLike[str]) -> Path:
    """The absolute path without links; before Python 3.13 `Path.resolve` raises RuntimeError at one that is a loop."""
    return Path(os.path.realpath(user_path(path)))


def sync(path: Path) -> None:
    """Put a file's bytes, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(path: Path) -> Path:
    """Remove what an unfinished or overwritten run left at `path` (rank 0 does it), and return it."""
    if rank() == 0:
        remove(path)
    return path


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a step log; none where there is no file, and without a last line that a kill cut short."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
