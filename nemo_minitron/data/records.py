"""Records of files, one reader for corpora, conversations, preferences, questions and prompts.

.jsonl .ndjson     one JSON object a line
.json              an array of objects, an object a line, or one object
.parquet           rows
anything else      text, or where records are asked for, one JSON object a line

Each may be compressed (`data.compressed`). A byte order mark and CRLF are no part of a text. Other containers of data
are refused by name, and so is JSON under the name of a text: nobody trains on its braces.
"""

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.untrusted import check_no_pointer
from nemo_minitron.data.compressed import SUFFIXES, decompressed
from nemo_minitron.data.json_stream import objects_of_array
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import LONGEST_LINE, lines_of

_BOM = b"\xef\xbb\xbf"
_LINES, _JSON, _PARQUET, TEXT = "lines", "json", "parquet", "text"
_KINDS = {
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".jsonlines": _LINES,
    ".json": _JSON,
    ".parquet": _PARQUET,
    ".pq": _PARQUET,
}
_REFUSED = (
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".sqlite", ".db"),
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".doc", ".docx", ".odt", ".epub", ".pkl", ".pickle"),
    *(".npy", ".npz", ".pt", ".bin", ".idx", ".h5", ".tfrecord", ".msgpack", ".lz4", ".z", ".br", ".snappy"),
)
_LEGAL = "must be text, or .json, .jsonl, .ndjson or .parquet, plain or as .gz, .zst, .bz2 or .xz"
# Values repeat in a Parquet file for next to nothing; so many rows of it are in memory at once.
_ROWS = 16


@dataclass(frozen=True)
class Record:
    """One record of a file.

    `value`: the object, or the InputError that says why there is none; `where`: for refusals, "FILE, line 3"; `number`:
    of the line, row or item, from 1; `place`: "FILE:3".
    """

    value: Any
    where: str
    number: int
    place: str


def kind_of(path: str | Path) -> str:
    """What a file is by its name: "lines", "json", "parquet" or "text".

    Raises:
        InputError: a name of something that is not read, such as .csv.
    """
    name = Path(path).name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    if suffix in _REFUSED:
        raise InputError(f"{path}: {suffix} files are not read; {_LEGAL}")
    return _KINDS.get(suffix, TEXT)


def read_records(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a file; blank lines are passed over.

    Args:
        columns: the keys that are looked at, so that a Parquet file's others are not read; null: all.

    Raises:
        InputError: the file cannot be read, now or further on. What is wrong with one record is its value.
    """
    kind = kind_of(path)
    try:
        check_no_pointer(Path(path), str(path))
        if kind == _PARQUET:
            yield from _rows(path, columns)
            return
        with decompressed(path) as file:
            if kind == _JSON:
                yield from _json(file, path)
            else:
                yield from _lines(lines_of(file, str(path)), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_document(path: str | Path) -> str:
    """The text of a file that is one document, without a byte order mark.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is JSON.
    """
    try:
        check_no_pointer(Path(path), str(path))
        with decompressed(path) as file:
            data = file.read(LONGEST_LINE + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > LONGEST_LINE:
        raise InputError(
            f"{path}: cannot be read (more than {LONGEST_LINE:,} bytes); larger texts are read as .jsonl, one document "
            "a line"
        )
    text = decode(data.removeprefix(_BOM), str(path))
    if _is_json(text):
        raise InputError(
            f"{path}: holds JSON, and would be read as text; name it .jsonl or .json, or leave it out"
        )
    return text


def read_text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, without their ends, and their numbers from 1; blank ones are passed over.

    Raises:
        InputError: as `read_document`; names the line that is not UTF-8.
    """
    try:
        with decompressed(path) as file:
            for number, line in enumerate(lines_of(file, str(path)), start=1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, decode(line, f"{path}, line {number}").rstrip("\r\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode(data: bytes, where: str) -> str:
    """Bytes as UTF-8.

    Raises:
        InputError: they are not; names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it begins as UTF-16 does" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise InputError(
            f"{where}: not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}){hint}"
        ) from None


def _is_json(text: str) -> bool:
    """Whether a text is JSON of records: as a whole, or by its first line."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return False
    for part in (text.partition("\n")[0], text):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and first:
            return True
    return False


def _lines(lines: Iterator[bytes], path: str | Path, first: int = 1) -> Iterator[Record]:
    for number, line in enumerate(lines, start=first):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            where = f"{path}, line {number}"
            yield Record(_object(line, where), where, number, f"{path}:{number}")


def _object(data: bytes, where: str) -> Mapping[str, Any] | InputError:
    try:
        value = json.loads(decode(data, where))
    except InputError as error:
        return error
    except json.JSONDecodeError as error:
        return InputError(f"{where}: not JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: not JSON ({error})")
    return _expect_object(value, where)


def _expect_object(value: Any, where: str) -> Mapping[str, Any] | InputError:
    if isinstance(value, Mapping):
        return value
    hint = "; an array of them is read from a file named .json" if isinstance(value, list) else ""
    return InputError(f"{where}: expected a JSON object, found {type(value).__name__}{hint}")


def _json(file: BinaryIO, path: str | Path) -> Iterator[Record]:
    """Of a .json file: an array, an object a line, or one object over several lines."""
    line, begin = _first_byte(file)
    if begin == b"[":
        for number, at, value in objects_of_array(file, str(path), line):
            where = f"{path}, line {at}, item {number}"
            yield Record(_expect_object(value, where), where, number, f"{path}:{at}")
        return
    first = begin + next(lines_of(file, str(path)), b"")
    if first.rstrip().endswith(b"}"):
        rest = lines_of(file, str(path))
        yield from _lines(itertools.chain([first], rest), path, line)
        return
    whole = first + file.read(LONGEST_LINE) + file.readline(LONGEST_LINE)
    where = f"{path}, line {line}"
    if len(whole) <= LONGEST_LINE and isinstance(found := _object(whole, where), Mapping):
        yield Record(found, where, line, f"{path}:{line}")
    else:
        yield from _lines(itertools.chain(io.BytesIO(whole), lines_of(file, str(path))), path, line)


def _first_byte(file: BinaryIO) -> tuple[int, bytes]:
    """The first byte that is not blank, and its line."""
    line, found = 1, file.read(1)
    if found == _BOM[:1]:
        rest = file.read(2)
        found = file.read(1) if found + rest == _BOM else found + rest
    while found in (b" ", b"\t", b"\r", b"\n"):
        line += found == b"\n"
        found = file.read(1)
    return line, found


def _rows(path: str | Path, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with decompressed(path) as file, parquet.ParquetFile(_seekable(file)) as table:
            names = table.schema_arrow.names
            chosen = None if columns is None else [name for name in names if name in columns]
            # Without its text the first few names are all that is told of a row.
            for batch in table.iter_batches(_ROWS, columns=chosen or names[:8], use_threads=False):
                for row in _values(batch):
                    number += 1
                    where = f"{path}, row {number}"
                    found = InputError(f"{where}: {row}") if isinstance(row, str) else row
                    yield Record(found, where, number, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(error)[:200]})") from None


def _seekable(file: BinaryIO) -> BinaryIO:
    """Parquet is read from its end; what was compressed once more around it is not unpacked."""
    if not file.seekable():
        raise OSError("compressed as a whole; Parquet files are compressed inside")
    return file


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; of one whose text is not UTF-8 the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8 (byte {error.start})"
