"""Values on their way to a file: converted a block at a time, while the disk takes those before."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch import Tensor

Write = Callable[[memoryview], object]
# Values that are converted at a time: what the processor's cache holds. Larger temporaries cost more in page faults
# than the conversion itself.
_BLOCK = 1 << 18
_BEHIND = 64 << 20  # bytes that wait before the disk is told of them


@contextmanager
def to_disk(opened: BinaryIO) -> Iterator[Write]:
    """A file's `write`, which lets the disk work meanwhile; when this ends, all of it is there.

    Raises:
        OSError: the disk's, perhaps some writes later.
    """
    handed, last = 0, None

    with ThreadPoolExecutor(1) as behind:

        def write(block: memoryview) -> None:
            nonlocal handed, last
            opened.write(block)
            handed += len(block)
            if handed >= _BEHIND and _free(last):
                handed, last = 0, behind.submit(os.fdatasync, opened.fileno())

        yield write
        if last is not None:
            last.result()
    opened.flush()
    os.fsync(opened.fileno())


def _free(last: Future[None] | None) -> bool:
    if last is None:
        return True
    if last.done():
        last.result()
    return last.done()


def write_values(
    write: Write, tensor: Tensor, dtype: torch.dtype, check: Callable[[Tensor], None] = lambda _: None
) -> int:
    """Write a tensor's values in another dtype; besides the tensor one block is in memory.

    Args:
        tensor: of a floating dtype.
        check: told each block as it is written, [n], of `dtype`.

    Returns:
        How many bytes these were.
    """
    flat = tensor.reshape(-1)
    size = min(_BLOCK, flat.numel())
    single, block = torch.empty(size), torch.empty(size, dtype=dtype)
    for begin in range(0, flat.numel(), size):
        values = flat[begin : begin + size]
        if tensor.dtype != dtype:
            # Between the two halves torch is twice as fast by way of float32, and the values are the same.
            if torch.float32 not in (tensor.dtype, dtype):
                values = single[: len(values)].copy_(values)
            values = block[: len(values)].copy_(values)
        check(values)
        write(values.view(torch.uint8).numpy().data)
    return flat.numel() * dtype.itemsize
