"""Numbers of a config.json, each with the one message that a wrong one gets."""

import math
from typing import Any

from nemo_minitron.arch import LARGEST_SIZE
from nemo_minitron.errors import InputError


def positive_integer(value: Any, name: str, where: str) -> int:
    """A size.

    Raises:
        InputError: no integer (booleans are none), below 1, or larger than any model's.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
        raise InputError(f"{where}: config.json: {name}={short(value)}: must be a positive integer")
    return value


def positive_number(value: Any, name: str, where: str) -> float:
    """A finite number above 0.

    Raises:
        InputError: another kind of value, NaN, infinity, zero or below.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _is_finite(value) or value <= 0:
        raise InputError(f"{where}: config.json: {name}={short(value)}: must be a positive, finite number")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def short(value: Any) -> str:
    """A value for a message: a file may hold one of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."
