"""Runs a function of a test module on gloo ranks: processes that are started once and kept between tests.

`run_on_ranks(2, function, *args)` calls an importable (module-level) function on ranks 0 and 1 and returns
their results by rank; arguments and results are pickled. Inside it, `layout(tp=2, sp=True)` sets up
Megatron's parallel state, and may be called again for another layout. Importing Megatron takes 6 s, hence the
reuse; each call gets a process group of its own, so nothing of an earlier test's communication is left.
"""

import atexit
import contextlib
import datetime
import importlib
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Once a rank has failed, others may wait for it in a collective for ever; those that fail too do it at once.
GRACE_S = 3.0
START_S = 120.0


class RankError(RuntimeError):
    """A rank failed: carries its number and traceback."""


# ---- in the rank's process ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What `layout` has set up. `sp` has to be handed to the model's config, Megatron knows the rest."""

    tp: int
    pp: int
    cp: int
    dp: int
    sp: bool


@dataclass
class _Call:
    """The process groups of the call that a rank is working on."""

    rank: int
    world_size: int
    directory: str
    timeout: float
    groups_made: int = 0


_call: _Call | None = None


def layout(tp: int = 1, pp: int = 1, cp: int = 1, sp: bool = False) -> Layout:
    """Set up Megatron's parallel state over all ranks of this call; data parallelism takes what is left.

    May be called several times, by all ranks alike: the former process groups are destroyed.
    """
    assert _call is not None, "layout() works inside a function that run_on_ranks runs"
    from megatron.core import parallel_state, tensor_parallel

    _start_group()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return Layout(tp, pp, cp, _call.world_size // (tp * pp * cp), sp)


def _start_group() -> None:
    import torch.distributed as dist

    assert _call is not None
    _destroy_groups(barrier=True)
    store = dist.FileStore(f"{_call.directory}/store{_call.groups_made}", _call.world_size)
    _call.groups_made += 1
    dist.init_process_group(
        "gloo",
        store=store,
        rank=_call.rank,
        world_size=_call.world_size,
        timeout=datetime.timedelta(seconds=_call.timeout),
    )


def _destroy_groups(barrier: bool) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        if barrier:
            # A rank that is through may close before this one has seen its last message off. One that died is found
            # by its pipe; a barrier that times out stays an error.
            try:
                dist.barrier()
            except RuntimeError as error:
                if "by peer" not in str(error):
                    raise
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _run(call: _Call, module: str, name: str, args: tuple[Any, ...]) -> Any:
    global _call
    _call = call
    function = getattr(importlib.import_module(module), name)
    # Megatron numbers the checkpoints that a process saves, and compares; not all of these have saved the same ones.
    if strategies := sys.modules.get("megatron.core.dist_checkpointing.strategies.base"):
        strategies.async_calls = type(strategies.async_calls)()
    try:
        _start_group()
        result = function(*args)
    except BaseException:
        _destroy_groups(barrier=False)
        raise
    _destroy_groups(barrier=True)
    return result


def _serve(connection: Connection) -> None:
    """A rank's life: prepare Megatron, then run what comes until the other end closes."""
    import torch

    torch.set_num_threads(1)
    from nemo_minitron import cpu_compat

    cpu_compat.prepare_megatron()
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            call, module, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _run(call, module, name, args)))
        except BaseException as error:
            answer = pickle.dumps((False, (_portable(error), traceback.format_exc())))
        connection.send_bytes(answer)


def _portable(error: BaseException) -> BaseException | None:
    """The exception if it survives pickling, so that pytest.raises can name its type."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None


# ---- in pytest's process -----------------------------------------------------------------------------------


class RankPool:
    """Rank processes, started when first needed (rank 0 and 1 serve a call of two ranks, and so on)."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._directory = tempfile.mkdtemp(prefix="ranks")
        self._calls = 0

    def run(
        self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        """See `run_on_ranks`."""
        self._start(world_size)
        directory = f"{self._directory}/{self._calls}"
        os.mkdir(directory)
        self._calls += 1
        for rank in range(world_size):
            call = _Call(rank, world_size, directory, timeout)
            task = pickle.dumps((call, function.__module__, function.__qualname__, args))
            self._ranks[rank][1].send_bytes(task)
        try:
            return self._answers(world_size, timeout)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()

    def remove(self) -> None:
        """`close`, and leave no files."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, world_size: int) -> None:
        fresh = []
        with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONPATH=_python_path()):
            while len(self._ranks) < world_size:
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._ranks.append((process, ours))
                fresh.append(ours)
        for connection in fresh:
            if not connection.poll(START_S):
                self.close()
                raise RankError(f"a rank did not start within {START_S} s")
            pickle.loads(connection.recv_bytes())

    def _answers(self, world_size: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[BaseException] = []
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks[:world_size])}
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    good, results[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    good, results[rank] = (
                        False,
                        (None, f"the process ended, exit code {self._exit_code(rank)}"),
                    )
                if not good:
                    failures.append(_failure(rank, *results[rank]))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if waiting or any(not process.is_alive() for process, _ in self._ranks):
            self.close()
        if failures:
            raise failures[0]
        if waiting:
            raise RankError(f"no answer from ranks {sorted(waiting.values())} within {timeout} s")
        return [results[rank] for rank in range(world_size)]

    def _exit_code(self, rank: int) -> int | None:
        process = self._ranks[rank][0]
        process.join(5)
        return process.exitcode


def _failure(rank: int, error: BaseException | None, trace: str) -> BaseException:
    cause = RankError(f"rank {rank}:\n{trace}")
    if error is None:
        return cause
    error.__cause__ = cause
    return error


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_pool: RankPool | None = None


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks; returns the results by rank.

    Raises:
        The exception of the first rank that failed, with its traceback as the cause (a RankError if it cannot
        be pickled, if a rank died, or if `timeout` seconds passed; hung ranks are killed and started anew).
    """
    global _pool
    if _pool is None:
        assert str(ROOT) in sys.path or os.getcwd() == str(ROOT)
        _pool = RankPool()
        atexit.register(_pool.remove)
    return _pool.run(world_size, function, args, timeout)
