"""A sweep (`-m`): one process a configuration, in turn, each with a run directory of its own."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from nemo_minitron.environment import COMPOSE


def is_sweep() -> bool:
    """Whether the running configuration is one of a sweep here; a launcher's sweep runs elsewhere."""
    if COMPOSE in os.environ or not HydraConfig.initialized():
        return False
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def directory() -> str | None:
    """Hydra's directory of a sweep's running job."""
    return HydraConfig.get().runtime.output_dir if is_sweep() else None


def in_its_own_process(work: Callable[[], None]) -> None:
    """Run one job of a sweep in a fork, wait for it, and end the sweep where it ends badly.

    Megatron's and Lightning's state is a process's: a second job would find the first one's groups and seeds.

    Raises:
        SystemExit: in the fork, at its end; here with its exit code, where that is not 0.
    """
    made = HydraConfig.get().runtime.output_dir
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    with _passed_on(child):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        os.rmdir(made)  # Hydra's, where the job was refused or is elsewhere
    if code:
        sys.exit(code if code > 0 else 128 - code)


@contextlib.contextmanager
def _passed_on(child: int) -> Iterator[None]:
    """Who ends the sweep ends its job, which answers."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(n, lambda number, _frame: os.kill(child, number)) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
