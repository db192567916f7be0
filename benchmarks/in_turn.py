"""Two sides of a benchmark in processes of their own, which stay and take turns, a run each.

Parent and side talk in lines: the side says "ready", then answers each line "go" with a JSON object of one run.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


class Side:
    """A process of its own that does one run whenever it is asked to."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._line("ready")

    def run(self) -> dict[str, float]:
        """What one run took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self._line("{"))

    def end(self) -> None:
        """Closing its input ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _line(self, beginning: str) -> str:
        """The next line that begins so; libraries print too."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(beginning):
                return line
        sys.exit(f"{' '.join(self.command)} ended with exit code {self.process.wait()}")


def serve(work: Callable[[], float], held: int) -> None:
    """Be a side: warm up once, then do `work` at each "go".

    Args:
        work: one run; returns its loss, or another number by which sides are compared.
        held: bytes that both sides must hold: weights, gradients, optimizer.

    A run's answer: `wall_s`, `cpu_s` of the process, `value`, and `extra_bytes`: the process's peak since the models
    are there, beyond `held` and what it held before them (`before_models`).
    """
    with contextlib.suppress(OSError):  # what loading the models took at its peak does not count
        Path("/proc/self/clear_refs").write_text("5")
    work()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            return
        begin = time.perf_counter(), time.process_time()
        value = work()
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        extra = peak() - _before - held
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "value": value, "extra_bytes": extra}), flush=True)


_before = 0


def before_models() -> None:
    """From here on memory counts: imports are done, no model is there."""
    global _before
    torch = sys.modules.get("torch")
    _before = 0 if torch is not None and torch.cuda.is_available() else resident("VmRSS")


def peak() -> int:
    """The most memory so far in bytes: on CUDA what torch gave out, else the process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at its peak."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def compare(sides: Mapping[str, Side], runs: int) -> dict[str, Any]:
    """Let the sides take turns; medians of each, and medians of the runs' own ratios of the first to the second."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            found[name].append(side.run())
    for side in sides.values():
        side.end()
    line: dict[str, Any] = {"runs": runs}
    for key in ("wall_s", "cpu_s", "extra_bytes", "value"):
        for name, each in found.items():
            line[f"{key}_{name}"] = statistics.median(run[key] for run in each)
    first, second = found.values()
    for key in ("wall_s", "cpu_s", "extra_bytes"):
        ratios = [a[key] / b[key] for a, b in zip(first, second, strict=True) if b[key]]
        line[f"{key}_ratio"] = statistics.median(ratios) if ratios else None
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}
