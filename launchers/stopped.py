"""Ranks that somebody or something has stopped (SIGSTOP): the others would wait for them until a collective's time-out.

A debugger's stop is another state, and no reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.environment import STOPPED_S

EVERY_S = 1.0
# Who was not looked at for so long was not seen running or stopped in between: whoever looks was stopped too.
LONGEST_GAP_S = 5.0


class StoppedRanks:
    """Names the ranks that stay stopped for NEMO_MINITRON_STOPPED_S seconds (30), and ends them by SIGKILL.

    Where all are stopped nobody waits: a run that was suspended as a whole is left, and goes on at SIGCONT.

    Args:
        others: whether there are ranks elsewhere, which run.
    """

    def __init__(self, others: bool) -> None:
        self.others = others
        self.limit_s = float(os.environ.get(STOPPED_S, "30"))
        self.looked = -LONGEST_GAP_S
        self.since: dict[int, float] = {}

    def look(self, ranks: Mapping[int, int]) -> None:
        """Looks at process ids by rank, once a second however often it is asked to."""
        now = time.monotonic()
        if now - self.looked < EVERY_S:
            return
        stopped = [rank for rank, pid in ranks.items() if is_stopped(pid)]
        suspended = len(stopped) == len(ranks) and not self.others
        if suspended or now - self.looked > LONGEST_GAP_S:
            self.since.clear()
        self.looked = now
        if suspended:
            return
        self.since = {rank: self.since.get(rank, now) for rank in stopped}
        for rank, since in self.since.items():
            if now - since >= self.limit_s:
                say(f"rank {rank} (process {ranks[rank]}) was stopped for {now - since:.0f} s: killed")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ranks[rank], signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process (Linux)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    return False


def say(line: str) -> None:
    """To stderr at once."""
    print(f"launchers: {line}", file=sys.stderr, flush=True)
