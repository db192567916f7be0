"""The most memory that a piece of work held at once, beyond what was held before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")


def peak_bytes(work: Callable[[], Any]) -> int:
    """On CUDA what torch's allocator gave out; elsewhere resident memory, by the kernel's own high-water mark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def available_bytes() -> int:
    """What can still be had without swapping."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
