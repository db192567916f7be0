"""Files of text as they are, decompressed: gzip, bzip2 and xz by Python's own modules, Zstandard by Arrow's.

The content decides, not the name: what a browser has unpacked on the way keeps its `.gz`. A small file that unpacks to
very much is refused while it unpacks, so that it fills neither memory nor disk.
"""

import bz2
import errno
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nemo_minitron.errors import first_line
from nemo_minitron.files import open_regular

SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# Text shrinks to a third or a tenth; lines that repeat, to a fiftieth. Gzip can reach a thousandth, the others more.
LARGEST_RATIO = 200
_ALWAYS_READ = 1 << 30  # bytes
_BUFFER = 1 << 20


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise OSError(
            errno.ENOTSUP,
            "Zstandard: this pyarrow has no such codec; run `zstd -d`, or use pyarrow from PyPI",
        )
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


_OPENERS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), lambda file: gzip.GzipFile(fileobj=file, mode="rb")),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.BZ2File),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
)


@contextmanager
def decompressed(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The bytes of a regular file, decompressed where they are compressed.

    Raises:
        OSError: as `open_regular`; and while it is read: damaged, cut short, or far larger than a text.
    """
    with open_regular(path) as file:
        begin = file.read(10)
        file.seek(0)
        opener = next((opener for magic, opener in _OPENERS if magic.match(begin)), None)
        if opener is None:
            yield file
            return
        most = max(_ALWAYS_READ, LARGEST_RATIO * os.fstat(file.fileno()).st_size)
        with opener(file) as unpacked:
            yield io.BufferedReader(_Bounded(unpacked, Path(path).name, most), _BUFFER)


class _Bounded(io.RawIOBase):
    """What a decompressor gives, up to a limit; whatever a library raises becomes an OSError."""

    def __init__(self, unpacked: Any, name: str, most: int) -> None:
        self._unpacked, self._name, self._most, self._read = unpacked, name, most, 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of io.RawIOBase."""
        try:
            found = self._unpacked.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise OSError(
                errno.EIO,
                f"its compressed data is damaged or cut short: {first_line(error)[:200]}",
                self._name,
            ) from error
        self._read += len(found)
        if self._read > self._most:
            raise OSError(
                errno.EFBIG,
                f"more than {self._most:,} bytes when decompressed, over {LARGEST_RATIO} times the file",
                self._name,
            )
        buffer[: len(found)] = found
        return len(found)
