"""The container of a GGUF file: its metadata and where its tensors lie, from a file that may lie.

Every count, length and offset is held against what the file has before anything is allocated for it; gguf's own reader
(gguf 0.19.0, `gguf.GGUFReader`) trusts them. The format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.errors import InputError, need_package

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# What real files stay far below: a vocabulary of 256,000 with its merges takes about 10 MiB.
MAX_HEADER_BYTES = 128 << 20
_MAX_STRING_BYTES = 16 << 20
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_ELEMENTS = 1 << 22
_MAX_KEYS, _MAX_TENSORS = 1 << 14, 1 << 17
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class _Damaged(Exception):
    """The bytes are not what the format asks for; the message says what."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header tells of it.

    Attributes:
        shape: outermost dimension first, as torch counts (the file counts the other way).
        kind: how its numbers are stored.
        start, size: where its bytes lie in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's header. `metadata`: Python scalars, strings, lists of strings, and numpy arrays of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(path: Path, where: str) -> GGUFFile:
    """Read and check everything but the weights.

    Args:
        where: how messages name the file, such as "source=model.gguf".

    Raises:
        InputError: damaged, cut short, of another version, or split over several files; gguf is not installed.
    """
    need_package("gguf", f"{where}, a GGUF file")
    try:
        with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _read(_Cursor(data))
    except (_Damaged, OSError, ValueError) as error:
        raise InputError(f"{where}: a damaged GGUF file ({error})") from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{where}: one of {metadata['split.count']} parts; join them first (llama.cpp's llama-gguf-split --merge)"
        )
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Walks over the header; never past its end, nor past `MAX_HEADER_BYTES`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, min(len(data), MAX_HEADER_BYTES)

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.at:
            cut = (
                "the file ends"
                if self.end == len(self.data)
                else f"the header passes {MAX_HEADER_BYTES >> 20} MiB"
            )
            raise _Damaged(f"{cut} within {what}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise _Damaged(f"{what} has {length} bytes, more than {limit}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise _Damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise _Damaged(f"{key} has the unknown type {kind}")
        return self._numbers(kind, 1, key)[0].item()

    def array(self, key: str) -> Any:
        kind, count = self.number("<I", key), self.number("<Q", key)
        if count > _MAX_ELEMENTS:
            raise _Damaged(f"{key} has {count} elements, more than {_MAX_ELEMENTS}")
        if kind == _STRING:
            return [self.string(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise _Damaged(f"{key} is an array of the type {kind}, which is not read")
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> Any:
        form = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * form.itemsize, key), form)


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    if cursor.take(4, "the magic number") != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise _Damaged(f"version {version}; 2 and 3 are read, little-endian")
    tensors, keys = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of keys")
    if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
        raise _Damaged(f"{tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string("a key", _MAX_NAME_BYTES)
        if key in metadata:
            raise _Damaged(f"{key} occurs twice")
        metadata[key] = cursor.value(cursor.number("<I", key), key)
    raw = [_raw_entry(cursor) for _ in range(tensors)]
    return metadata, _placed(raw, metadata.get("general.alignment", 32), cursor)


def _raw_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (outermost first), type and offset of the next tensor."""
    name = cursor.string("a tensor's name", _MAX_NAME_BYTES)
    dimensions = cursor.number("<I", name)
    if not 1 <= dimensions <= 4:
        raise _Damaged(f"{name} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q", name) for _ in range(dimensions))
    return name, shape[::-1], cursor.number("<I", name), cursor.number("<Q", name)


def _placed(
    raw: list[tuple[str, tuple[int, ...], int, int]], alignment: Any, cursor: _Cursor
) -> dict[str, TensorEntry]:
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment!r}")
    from gguf import GGMLQuantizationType

    begin, tensors = -(-cursor.at // alignment) * alignment, {}
    for name, shape, kind, offset in raw:
        if name in tensors:
            raise _Damaged(f"{name} occurs twice")
        size = _size(name, shape, kind)
        if offset % alignment or begin + offset + size > len(cursor.data):
            raise _Damaged(f"{name} does not lie within the file: {size} bytes from {offset}")
        tensors[name] = TensorEntry(name, shape, GGMLQuantizationType(kind), begin + offset, size)
    return tensors


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Damaged(f"{name} is stored in the unknown type {kind}") from None
    if not all(shape) or shape[-1] % block:
        raise _Damaged(f"{name} has shape {list(shape)}, in blocks of {block}")
    count = 1
    for length in shape:
        count *= length
    return count // block * block_bytes
