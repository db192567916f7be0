"""Held-out files that are training files under another name."""

import functools
import os
import stat
from collections import defaultdict
from collections.abc import Sequence

from nemo_minitron.errors import InputError
from nemo_minitron.files import file_sha256


def refuse_shared(train: Sequence[str], valid: Sequence[str], train_key: str, valid_key: str) -> None:
    """Refuse a held-out file that is a training file: the same path, a link to it, or a copy of it.

    Contents are read only of files of the same size. Paths that cannot be read are left to whoever reads them.

    Args:
        train, valid: paths.
        train_key, valid_key: what the configuration calls them.

    Raises:
        InputError: names both files.
    """
    inodes: dict[tuple[int, int], str] = {}
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in train:
        if (found := _regular(path)) is not None:
            inodes[found.st_dev, found.st_ino] = path
            sizes[found.st_size].append(path)
    sha256 = functools.cache(file_sha256)
    for path in valid:
        if (found := _regular(path)) is None or not found.st_size:
            continue
        other = inodes.get((found.st_dev, found.st_ino))
        how = (
            "is"
            if other and os.path.abspath(other) == os.path.abspath(path)
            else "is a link to the same file as"
        )
        if other is None:
            how = "has the same content as"
            other = next((p for p in sizes.get(found.st_size, ()) if sha256(p) == sha256(path)), None)
        if other is not None:
            raise InputError(
                f"{valid_key}: {path} {how} {other} of {train_key}; a held-out file is not trained on"
            )


def _regular(path: str) -> os.stat_result | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None
