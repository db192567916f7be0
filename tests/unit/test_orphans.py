"""Processes that are killed by SIGKILL leave none behind that they had started."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.commands import ROOT

# A server for a queue, a spawned process with a child of its own, and two kinds of forks.
FAMILY = """
import multiprocessing, os, threading, time
from nemo_minitron.run import orphans

def parent():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    time.sleep(600)

if __name__ == "__main__":
    orphans.end_children_with_this_process()
    spawn = multiprocessing.get_context("spawn")
    manager = spawn.Manager()
    queue = manager.Queue()
    spawn.Process(target=parent).start()
    if os.fork() == 0:
        time.sleep(600)
    # Its thread ends before it does.
    process = spawn.Process(target=queue.put, args=("from a thread's process",))
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    print(queue.get(), flush=True)
    process.join()
    assert process.exitcode == 0
    time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "NEMO_MINITRON_LAUNCHED_BY": str(os.getpid())})
time.sleep(600)
"""
RANK = """
import os, time
from nemo_minitron.run import orphans
orphans.end_with_launcher()
assert "NEMO_MINITRON_LAUNCHED_BY" not in os.environ
print("bound", flush=True)
time.sleep(600)
"""


def of_session(session: int) -> list[str]:
    """Command lines of a session's live processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            state, _, _, number = (process / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(number) == session and state != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def left_after(seconds: float, session: int) -> list[str]:
    """Those that live when the last has ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def killed(command: list[str], says: str, processes: int) -> list[str]:
    """What is left of a session, of so many processes, some seconds after its first one was killed."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == says
        deadline = time.monotonic() + 60
        while len(of_session(process.pid)) < processes:
            assert time.monotonic() < deadline, of_session(process.pid)
            time.sleep(0.05)
        process.kill()
        return left_after(10, process.pid)
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])
        process.communicate()


def test_the_children_of_a_killed_process_end(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    # Itself, multiprocessing's tracker of resources, the server, the spawned one and its fork, the bare fork.
    assert killed([sys.executable, str(script)], "from a thread's process", 6) == []


def test_a_rank_ends_with_its_killed_launcher() -> None:
    assert killed([sys.executable, "-c", LAUNCHER, RANK], "bound", 2) == []
