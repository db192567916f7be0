"""Fixtures of the tests that run on several ranks."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support import ranks


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[Any]]:
    """`ranks.run_on_ranks`: its processes serve all tests of the session."""
    return ranks.run_on_ranks
