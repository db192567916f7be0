"""Long work: a bar that shows how far it is, and Ctrl-C, which ends it at the latest at its next step."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from nemo_minitron.environment import INTERRUPTED_BY_USER, rank

# Ctrl-C reaches a process twice where its parent passes it on as well.
_SAME_INTERRUPT_S = 1.0
_asked_at: float | None = None


def take_interrupts() -> None:
    """Ctrl-C unwinds the run once, so that it leaves nothing behind; a second one ends it at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(_number: int, _frame: FrameType | None) -> None:
    global _asked_at
    now = time.monotonic()
    if _asked_at is None:
        _asked_at = now
        raise KeyboardInterrupt
    if now - _asked_at > _SAME_INTERRUPT_S:
        os._exit(INTERRUPTED_BY_USER)


def asked_to_end() -> bool:
    """Whether Ctrl-C came: Lightning turns KeyboardInterrupt into exit code 1, others into what they like."""
    return _asked_at is not None


def end_if_asked() -> None:
    """Called at each step of long work: an exception is lost where C code discards what an attribute lookup raises.

    Raises:
        KeyboardInterrupt: Ctrl-C came before.
    """
    if asked_to_end():
        raise KeyboardInterrupt


def measure_bars_steadily() -> None:
    """Let all bars of this process, libraries' too, measure by a clock that nobody sets.

    tqdm asks `time.time` (4.67): set the clock back by hours, and a bar says "-1:59:54" and stands still for as long.
    """
    from tqdm import _monitor, std

    std.time = _monitor.time = time.monotonic  # type: ignore[attr-defined]


def open_bar(label: str, total: int, unit: str) -> Any:
    """tqdm's bar on stderr, renewed in place on a terminal, now and then elsewhere; `unit`: "B" for bytes."""
    from tqdm import tqdm

    measure_bars_steadily()
    every = 1.0 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", file=sys.stderr, mininterval=every
    )


def progress_bar(label: str, total: int, *, unit: str = "seq", tokens: int = 0) -> Callable[[int], None]:
    """A line on rank 0's stderr, renewed in place on a terminal, now and then elsewhere.

    Args:
        label: what is done.
        total: of it, in units.
        unit: "B": bytes, shown as MB or GB.
        tokens: of each unit; 0: they differ.

    Returns:
        What is told how much is done, and raises KeyboardInterrupt where Ctrl-C came before.
    """
    if rank() != 0:
        return lambda _done: end_if_asked()
    bar = open_bar(label, total, unit)
    begin = time.monotonic()

    def show(done: int) -> None:
        end_if_asked()
        if tokens and (seconds := time.monotonic() - begin) > 0:
            bar.set_postfix_str(f"{min(total, done) * tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update(min(total, done) - bar.n)
        if bar.n >= total:
            bar.close()

    return show


def track(found: list[Any], split: str, step: int, figures: Mapping[str, Any]) -> None:
    """Give the numbers of a line of steps.jsonl to Lightning's loggers, as `train/loss` and so on."""
    numbers = {f"{split}/{key}": value for key, value in figures.items() if isinstance(value, int | float)}
    for tracker in found:
        tracker.log_metrics(numbers, step=step)
