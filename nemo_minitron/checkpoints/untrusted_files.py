"""Files that others made: only regular ones are opened, and a Git LFS pointer is told from what it points at."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.files import open_regular, read_text

_POINTER = b"version https://git-lfs.github.com/spec/"


def check_regular(directory: Path, where: str) -> None:
    """Refuse a directory in which something else than files and directories lies: to open a pipe waits for ever.

    Raises:
        InputError: names the pipe, socket or device.
    """
    for entry in sorted(directory.iterdir()):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise InputError(f"{where}: {entry.name} is not a regular file")


def check_no_pointer(file: Path, where: str) -> None:
    """Refuse what `git clone` leaves in place of a large file where Git LFS is not installed.

    Raises:
        InputError: names the file and the command that fetches it.
    """
    with open_regular(file) as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{where}: {file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}"
            )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        InputError: no regular file, a Git LFS pointer, too large, no JSON, or no object.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{where}: {file.name} is not a regular file")
    try:
        check_no_pointer(file, where)
        value = json.loads(read_text(file))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {file.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: {file.name} is not a JSON object")
    return value
