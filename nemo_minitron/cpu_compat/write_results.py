"""What a forked saver tells the process that waits for it, without a third process between them."""

import os
import pickle
import queue
import struct
import tempfile
from multiprocessing import reduction
from typing import Any

_LENGTH = struct.Struct("<Q")


class WriteResults:
    """Stands for `multiprocessing.Manager().Queue()` as megatron-core's savers use it: one process puts at a time, and
    the one that made it takes after that process has ended.

    A manager is a process that imports torch to unpickle a result it only passes on, and stays if the run is killed. A
    pipe holds 64 KiB, so that the saver would wait for a reader that waits for its end. This is memory that both
    see: it is inherited by a fork and handed over to a spawned process.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _memory() if descriptor is None else descriptor
        self._taken = 0

    def put(self, result: Any) -> None:
        """Append a result."""
        content = pickle.dumps(result)
        at = os.fstat(self._descriptor).st_size
        left = memoryview(_LENGTH.pack(len(content)) + content)
        while left:
            written = os.pwrite(self._descriptor, left, at)
            left, at = left[written:], at + written

    def get_nowait(self) -> Any:
        """The oldest result not yet taken here.

        Raises:
            queue.Empty: there is none, or its writer died over it.
        """
        head = os.pread(self._descriptor, _LENGTH.size, self._taken)
        if len(head) < _LENGTH.size:
            raise queue.Empty
        (size,) = _LENGTH.unpack(head)
        content = self._read(self._taken + _LENGTH.size, size)
        self._taken += _LENGTH.size + size
        return pickle.loads(content)  # what this run's own saver put

    def _read(self, at: int, size: int) -> bytes:
        content = b""
        while len(content) < size:
            part = os.pread(self._descriptor, size - len(content), at + len(content))
            if not part:
                raise queue.Empty
            content += part
        return content

    def __reduce__(self) -> Any:
        return _handed_over, (reduction.DupFd(self._descriptor),)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _handed_over(descriptor: Any) -> WriteResults:
    return WriteResults(descriptor.detach())


def _memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("write-results")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
