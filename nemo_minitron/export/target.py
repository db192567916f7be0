"""Where an export goes: nothing half-written ever has the final name."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.files import put, real, remove

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BESIDE_WEIGHTS = 64 << 20  # bytes; tokenizer, template, card


def bytes_of(key: str, size: str) -> int:
    """A size as transformers writes it, such as "5GB", or a number of bytes.

    Raises:
        InputError: neither, or none at all.
    """
    text = str(size).strip().upper()
    unit = _UNITS.get(text[-2:], 1)
    number = text[:-2].strip() if unit > 1 else text
    if not (number.isascii() and number.isdigit() and int(number[:19]) > 0 and len(number) < 16):
        raise InputError(
            f"{key}={str(size)[:100]}: must be a number of bytes, or one of {', '.join(_UNITS)} as 5GB"
        )
    return int(number) * unit


def check_target(to: str | Path, *sources: str | Path, size: int, overwrite: bool) -> Path:
    """The absolute path that is to be written.

    Args:
        to: a directory or a file.
        sources: what is read.
        size: of the weights that will be written, in bytes.
        overwrite: whether something may be there.

    Raises:
        InputError: something is there, it is a source or inside of it or around it, nothing can be made there, or the
            disk is too small.
    """
    target, above = _place(to)
    for source in sources:
        origin = real(source)
        if target == origin or origin in target.parents:
            raise InputError(f"to={to}: is inside the source {source}; choose another place")
        if target in origin.parents:
            raise InputError(f"to={to}: holds the source {source}; choose another place")
    if os.path.lexists(target) and not overwrite:
        raise InputError(f"to={to}: is there already; choose another place or say overwrite=true")
    if not above.is_dir():
        raise InputError(f"to={to}: {above} is no directory")
    _try(to, above)
    needed, free = size + _BESIDE_WEIGHTS, shutil.disk_usage(above).free
    if free < needed:
        raise InputError(
            f"to={to}: {free / 2**30:.2f} GiB are free on its disk, the export needs {needed / 2**30:.2f} GiB"
        )
    return target


def _place(to: str | Path) -> tuple[Path, Path]:
    """The absolute path, and what is there of the way to it."""
    try:
        target = Path(to).expanduser().resolve()
        above = next((path for path in target.parents if _is_there(path)), target)
        if target.name:
            _is_there(_temporary(target))
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"to={to}: is no place to write at ({reason})") from None
    return target, above


def _is_there(path: Path) -> bool:
    """As a system call says it: `Path.exists` hides a name that is too long."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _try(to: str | Path, above: Path) -> None:
    """Tried, not asked: /proc and read-only disks look writable to root, and have no byte free."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".tried-", dir=above))
    except OSError as error:
        raise InputError(f"to={to}: nothing can be made in {above} ({error.strerror})") from None


@contextmanager
def under_another_name(target: Path) -> Iterator[Path]:
    """A path beside the target to write a directory or file at; it gets the target's name if all goes well, and is
    removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    remove(temporary)
    try:
        yield temporary
        old = target.with_name(f".{target.name}.old")
        remove(old)
        if os.path.lexists(target):
            os.replace(target, old)
        put(temporary, target)
        remove(old)
    finally:
        remove(temporary)
