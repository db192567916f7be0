"""A plugin of pytest (`-p tests.support.which_megatron`): ends with the megatron-core that the tests had imported, in
pytest's own process and on a rank."""

import sys

import pytest

from tests.support.ranks import run_on_ranks


def imported() -> str:
    """Version and place; it is not imported here."""
    core = sys.modules["megatron.core"]
    return f"{core.__version__} {core.__file__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"megatron-core here: {imported()}")
    terminalreporter.write_line(f"megatron-core on a rank: {run_on_ranks(1, imported)[0]}")
