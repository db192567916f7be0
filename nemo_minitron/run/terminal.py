"""What a recipe leaves to the terminal: what is expected is kept back, and no library greets."""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.environment import verbose

# Libraries that greet at INFO level, or warn of what is not installed, whenever they are imported.
_TALKATIVE = ("pytorch_lightning", "lightning", "nemo", "NeMo", "megatron", "datasets", "matplotlib", "root")
_EXPECTED = (
    ".*pynvml.*",
    ".*Apex is not installed.*",
    ".*Transformer Engine and Apex.*",
    ".*transformer_engine.*",
)
# For the processes that libraries start: Python takes no pattern there, only how a message begins.
_PYNVML = "ignore:The pynvml package is deprecated:FutureWarning"
_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"


def quiet() -> None:
    """Keep back warnings that are expected, here and in child processes, before and after libraries set filters."""
    if verbose():
        return
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    given = os.environ.get("PYTHONWARNINGS", "")
    if _PYNVML not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{_PYNVML}".strip(",")
    if not hasattr(warnings.showwarning, "shows"):
        warnings.showwarning = _without_expected(warnings.showwarning)


def _without_expected(show: Callable[..., None]) -> Callable[..., None]:
    """NeMo and Lightning reset the filters; this stays."""

    def shown(message: Warning | str, *rest: Any, **more: Any) -> None:
        if not any(re.match(expected, str(message), re.DOTALL) for expected in _EXPECTED):
            show(message, *rest, **more)

    shown.shows = show  # type: ignore[attr-defined]
    return shown


def let_trackers_end() -> None:
    """W&B closes its run now: at the interpreter's end its lines would come after the path that is to be the last."""
    tracker = sys.modules.get("wandb")
    if tracker is not None and tracker.run is not None:
        tracker.finish()


def log_to_stderr() -> None:
    """The root logger's only handler: warnings and our own lines, without the libraries' greetings."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    if not verbose():
        # Not levels of loggers: the libraries set those again when they are imported.
        handler.addFilter(_is_no_greeting)
    root.handlers[:] = [handler]  # Hydra's own writes to stdout


def _is_no_greeting(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.split(".")[0] not in _TALKATIVE


def log_to_file(path: Path) -> None:
    """Everything that is logged goes there too, from its first line on."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)


class Tee(io.TextIOBase):
    """Holds back what Hydra prints before the task starts; passes everything through from then on."""

    def __init__(self, held: io.StringIO, started: Callable[[], bool]) -> None:
        self.held, self.started, self.stderr = held, started, sys.stderr

    def write(self, text: str) -> int:
        """Text goes to the terminal once the task has started, or where HYDRA_FULL_ERROR=1 asks for all."""
        show = self.started() or os.environ.get("HYDRA_FULL_ERROR") == "1"
        return (self.stderr if show else self.held).write(text)

    def flush(self) -> None:
        """Of the terminal."""
        self.stderr.flush()

    def fileno(self) -> int:
        """Of the terminal."""
        return self.stderr.fileno()

    def isatty(self) -> bool:
        """Of the terminal."""
        return self.stderr.isatty()


def short(value: object, most: int = 200) -> str:
    """A value for an error line: without line breaks, and with its middle left out where it is long."""
    text = " ".join(str(value).split())
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    with contextlib.suppress(Exception):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines:
            return f"{type(error).__name__}: {short(lines[0])}"
    return type(error).__name__
