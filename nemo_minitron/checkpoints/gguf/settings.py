"""The keys of a GGUF file's metadata, each with the kind of value and the range that it must have."""

import math
from typing import Any

import numpy as np

from nemo_minitron.errors import InputError

_LARGEST = (1 << 31) - 1
_REQUIRED: Any = object()


class Settings:
    """Checked access to metadata; keys that begin with a dot belong to the file's architecture, such as "llama"."""

    def __init__(self, metadata: dict[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.architecture = self.text("general.architecture")

    def _name(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def refuse(self, key: str, value: Any, wanted: str) -> InputError:
        """The error for a key's value."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return InputError(f"{self.where}: {self._name(key)}={shown}: {wanted}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as the file has it."""
        return self.metadata.get(self._name(key), default)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise InputError(f"{self.where}: the metadata lack {self._name(key)}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        """An integer from `least` to 2^31 - 1, or the default if the key is absent."""
        value = self._value(key, default)
        if value is default:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
            raise self.refuse(key, value, f"must be one integer from {least} to {_LARGEST}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive, finite number, or the default; a float32 is read as the shortest decimal that stands for it."""
        value = self._value(key, default)
        if value is default:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(key, value, "must be a positive number")
        with np.errstate(over="ignore"):
            short = float(str(np.float32(value)))
        return short if 0 < short < math.inf else float(value)

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string, or the default."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.refuse(key, value, "must be a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "must be true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; required."""
        value = self._value(key, _REQUIRED)
        if not isinstance(value, list):
            raise self.refuse(key, value, "must be a list of strings")
        return value

    def numbers(self, key: str, count: int, default: Any = _REQUIRED) -> Any:
        """`count` finite numbers, as a list, or the default."""
        value = self._value(key, default)
        if value is default:
            return default
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.refuse(key, value, f"must be a list of {count} numbers")
        if not np.isfinite(value).all():
            raise self.refuse(key, value, "holds a number that is not finite")
        return value.tolist()
