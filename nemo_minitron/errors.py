"""What a recipe's exit code tells: the exceptions behind 2, 1 and 75."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 1000


class InputError(ValueError):
    """Bad input: one line that names the value, the place and what would be legal.

    Recipes turn it into that line on stderr and exit code 2, before a model is loaded or an artifact written. A longer
    one than a terminal's page loses its middle: files of others hold values of any length.
    """

    def __init__(self, line: str) -> None:
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - 200]} ... {line[-150:]}"
        super().__init__(line)


@contextmanager
def of_setting(key: str) -> Iterator[None]:
    """Within it, a refusal of a file also names the setting that named the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def need_package(name: str, where: str, extras: str = "dev,search,device", instead: str = "") -> None:
    """Refuse what needs a package that `make setup` installs only where it is asked to.

    Args:
        name: as it is imported.
        where: the setting, and what it stands for.
        extras: those to ask for.
        instead: what would do without it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        way_out = f"; {instead}" if instead else ""
        raise InputError(f"{where}: needs the package {name} (make setup EXTRAS={extras}){way_out}")


def first_line(error: BaseException) -> str:
    """The first line of what a library says, or else the kind of its exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FailedRun(RuntimeError):
    """The run must not go on: one line that names what was found and what was expected.

    Recipes turn it into that line on stderr and exit code 1; what was finished is kept.
    """


class InterruptedRun(Exception):
    """The run was told to end and has saved a checkpoint from which it goes on when it is started again.

    Recipes turn it into one line on stderr and exit code 75 (EX_TEMPFAIL of sysexits.h).
    """
