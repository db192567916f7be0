"""A wall clock that a test sets while programs run: `clock.c`, compiled here and loaded before the C library.

The monotonic clock, sleeps and the dates of files stay the kernel's. libfaketime 0.9.10 did not do: its mutex is locked
for ever in a process that is forked from one with threads, and without that mutex sleeps of threads fail (EINVAL).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


class Clock:
    """What programs that have `environment` take for the time: the right one until it is set.

    Args:
        directory: for the library and the file that says how wrong the clock is.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler (cc, gcc) to make a clock of")
        directory.mkdir(exist_ok=True)
        library, self.file = directory / "clock.so", directory / "seconds"
        command = [
            compiler,
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(SOURCE),
            "-ldl",
        ]
        subprocess.run(command, check=True, timeout=60)
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCK_FILE": str(self.file)}

    def set(self, seconds: int) -> None:
        """Let it be so many seconds fast, or slow: eight bytes, which programs have mapped."""
        self.file.touch()
        with open(self.file, "r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
