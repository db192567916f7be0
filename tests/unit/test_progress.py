"""Ctrl-C ends long work also where the exception that it raises is lost, as it is in `__del__` and in C code."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Ctrl-C comes inside __del__, where Python discards what is raised; the work goes on until it says how far it is.
LOST = """
import os, signal, sys
sys.unraisablehook = lambda _: None
from nemo_minitron import progress

class Discards:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

progress.take_interrupts()
show = progress.progress_bar("working", 4)
for step in range(4):
    print(step, progress.asked_to_end(), flush=True)
    if step == 1:
        Discards()
    try:
        show(step + 1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_interrupt_ends_the_work_at_its_next_step(rank: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST],
        cwd=Path(__file__).resolve().parents[2],
        env={"RANK": rank},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.splitlines()) == (130, ["0 False", "1 False"]), done.stderr


# A clock that is set back by two hours whenever it is asked.
SET_BACK = """
import time
moments = iter(range(10**9, 0, -7200))
time.time = lambda: next(moments)
from nemo_minitron import progress
show = progress.progress_bar("working", 4)
for step in range(4):
    show(step + 1)
"""


def test_a_bar_measures_by_a_clock_that_nobody_sets() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SET_BACK], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert "4/4 [00:00<00:00" in done.stderr
    assert "-" not in done.stderr
