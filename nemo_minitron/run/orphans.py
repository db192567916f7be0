"""No process outlives the one that started it, also where SIGKILL leaves that one no time to see to it (Linux).

Megatron's checkpoints are written by forks of the rank (megatron-core 0.13.1, `filesystem_async.py`), a sweep's job
and a chat template's trial are forks too; what libraries spawn may wait for ever for who is gone.
"""

import ctypes
import functools
import os
import signal
import sys
import threading
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from nemo_minitron.environment import LAUNCHED_BY

_PR_SET_PDEATHSIG = 1  # prctl(2): cleared by fork, kept by exec
_parent: int | None = None


def end_with_launcher() -> None:
    """End this process when the launcher's that started it ends. Its own children are not the launcher's."""
    launcher = os.environ.pop(LAUNCHED_BY, None)
    if launcher is not None:
        _end_with(int(launcher))


@functools.cache
def end_children_with_this_process() -> None:
    """End what Python code forks or spawns from here on, and its children in turn, when this process ends.

    A program that `subprocess` starts is not meant. Nor is a process that another thread than the main one starts:
    the kernel would take the end of that thread for the end of the process.
    """
    if sys.platform != "linux":
        return
    os.register_at_fork(before=_remember, after_in_child=_end_with_remembered)
    # A spawned process begins with an empty interpreter, and reads there what its parent pickled.
    ForkingPickler.register(SpawnProcess, _pickled)


def _this_if_main_thread() -> int | None:
    return os.getpid() if threading.get_native_id() == os.getpid() else None


def _remember() -> None:
    global _parent
    _parent = _this_if_main_thread()


def _end_with_remembered() -> None:
    if _parent is not None:
        _end_with(_parent)


def _pickled(process: Any) -> tuple[Any, ...]:
    """What pickle would make of it, but that reading it binds the reader."""
    return _read, (type(process), _this_if_main_thread()), vars(process)


def _read(kind: type[SpawnProcess], parent: int | None) -> SpawnProcess:
    if parent is not None:
        _end_with(parent)
    end_children_with_this_process()
    return kind.__new__(kind)


def _end_with(parent: int) -> None:
    """SIGKILL for this process as soon as its parent has ended, which may have been before."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
