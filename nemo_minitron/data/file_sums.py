"""A record of checksums beside files that others write."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from nemo_minitron.files import file_sha256, write_text


class SumsFile:
    """The checksums of files of one directory, in a JSON file there, for a single writer at a time.

    Args:
        path: of the JSON file.
    """

    # What this process has found as it was recorded: path, size, time of change.
    _same: ClassVar[set[tuple[str, int, int]]] = set()

    def __init__(self, path: Path) -> None:
        self.path = path

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def differs(self, file: Path) -> bool:
        """Whether a file is not what it was when it was recorded; one that was not recorded is taken as it is."""
        recorded, known = self._read().get(file.name), _state(file)
        if recorded is None or known in self._same:
            return False
        if recorded != file_sha256(file):
            return True
        self._same.add(known)
        return False

    def record(self, files: Iterable[Path]) -> None:
        """Add the files that are not recorded yet, and forget those that are gone."""
        before = self._read()
        after = {f.name: before.get(f.name) or file_sha256(f) for f in files}
        if after != before:
            write_text(self.path, json.dumps(after, indent=1) + "\n")


def _state(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns
