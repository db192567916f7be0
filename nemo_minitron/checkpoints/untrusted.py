"""Files that others made. Everything that opens a checkpoint's pickles is in this file.

Only regular files are opened, and a Git LFS pointer is told from what it points at. A pickle may name what is listed
here and nothing else: no function of any module, no class beside the listed packages' dataclasses and enums.
"""

import dataclasses
import enum
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.files import open_regular, read_text

_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_PICKLE = 256 << 20  # bytes
# What the table of contents of a distributed checkpoint names: dataclasses and enums of these packages, and
_PICKLED_CLASSES_OF = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_PICKLED_BESIDE = {
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
}


def check_regular(directory: Path, where: str) -> None:
    """Refuse a directory in which something else than files and directories lies: to open a pipe waits for ever.

    Raises:
        InputError: names the pipe, socket or device.
    """
    for entry in sorted(directory.iterdir()):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise InputError(f"{where}: {entry.name} is not a regular file")


def check_no_pointer(file: Path, where: str) -> None:
    """Refuse what `git clone` leaves in place of a large file where Git LFS is not installed.

    Raises:
        InputError: names the file and the command that fetches it.
    """
    with open_regular(file) as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{where}: {file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}"
            )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        InputError: no regular file, a Git LFS pointer, too large, no JSON, or no object.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{where}: {file.name} is not a regular file")
    try:
        check_no_pointer(file, where)
        value = json.loads(read_text(file))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {file.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: {file.name} is not a JSON object")
    return value


def _member(of: Any, name: str) -> Any:
    """What stands for getattr, by which Python 3.11.0 to 3.11.3 (Debian 12's own) write an enum's member."""
    if isinstance(of, type) and issubclass(of, enum.Enum) and name in of.__members__:
        return of.__members__[name]
    raise pickle.UnpicklingError("it names builtins.getattr")


class _NamesOnly(pickle.Unpickler):
    """Unpickles what a distributed checkpoint's table of contents needs, and nothing else.

    The names of a package would not do: modules also hold functions, and other modules that they import.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if f"{module}.{name}" in _PICKLED_BESIDE or (module == "torch" and name.isidentifier()):
            found = super().find_class(module, name)
            if f"{module}.{name}" in _PICKLED_BESIDE or type(found).__name__ == "dtype":
                return found
        elif module.startswith(_PICKLED_CLASSES_OF) and name.isidentifier():
            found = super().find_class(module, name)
            own_class = isinstance(found, type) and found.__module__ == module
            if own_class and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def table_of_contents(file: Path, where: str) -> Any:
    """What a distributed checkpoint's `.metadata` says of its tensors (torch.distributed.checkpoint's Metadata).

    Raises:
        InputError: it is damaged, or would run code when it is opened.
    """
    try:
        with open_regular(file, _LARGEST_PICKLE) as opened:
            contents = _NamesOnly(opened).load()
        if not isinstance(getattr(contents, "state_dict_metadata", None), dict):
            raise TypeError(f"it holds a {type(contents).__name__}, no table of contents")
        return contents
    except Exception as error:
        raise InputError(
            f"{where}: {file.name} is damaged or not safe to open ({first_sentence(error)})"
        ) from None


def check_common(file: Path, where: str) -> None:
    """What is not sharded: plain values, which torch opens without running anything."""
    import torch  # a config.json is read without it

    try:
        with weights_may_only_be_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_regular(file, _LARGEST_PICKLE).close()
            torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{where}: {file.name} is damaged or not safe to open ({first_sentence(error)})"
        ) from None


def first_sentence(error: BaseException) -> str:
    """The first sentence of what a library says; torch's advice is to switch the protection off."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__


@contextmanager
def weights_may_only_be_tensors() -> Iterator[None]:
    """Within it, torch.load opens tensors and plain values only, whatever its caller asks for: megatron-core 0.13.1
    opens `common.pt` and extra states with weights_only=False (dist_checkpointing/strategies/common.py)."""
    import torch

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([PosixPath]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
