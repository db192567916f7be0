"""A JSON array, value by value, of files that are larger than memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from nemo_minitron.errors import InputError
from nemo_minitron.files import LONGEST_LINE

_BLOCK = 1 << 20
_BLANK = " \t\r\n"


class _Text:
    """What was read and not used yet, and the line that it begins at."""

    def __init__(self, file: BinaryIO, path: str, line: int) -> None:
        self._file, self._path, self.line = file, path, line
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.ended = False
        self.text, self.at = "", 0

    def _add(self, data: bytes) -> None:
        try:
            self.text += self._decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at)
            raise InputError(f"{self._path}, line {line} or later: not UTF-8 ({error.reason})") from None

    def more(self) -> bool:
        """Read on, as much again as is there; False at the end of the file."""
        if self.ended:
            return False
        self.skip_to(self.at)
        self.text, self.at = self.text[self.at :], 0
        data = self._file.read(max(_BLOCK, len(self.text)))
        self.ended = not data
        self._add(data)
        return True

    def skip_to(self, at: int) -> None:
        """Go to an index, and count the lines on the way."""
        self.line += self.text.count("\n", self.at, at)
        self.text, self.at = self.text[at:] if at > _BLOCK else self.text, 0 if at > _BLOCK else at

    def next(self) -> str:
        """The next character that is not blank, which stays; "" at the end."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in _BLANK:
                at += 1
            self.skip_to(at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def objects_of_array(file: BinaryIO, path: str, line: int) -> Iterator[tuple[int, int, Any]]:
    """The values of an array: number from 1, line, value.

    Args:
        file: behind the array's "[".
        path: for refusals.
        line: where the file stands, from 1.

    Raises:
        InputError: no whole JSON array; where one value ends cannot be told from there on.
    """
    text, number, decoder = _Text(file, path, line), 0, json.JSONDecoder()
    separator = "]" if text.next() == "]" else ","
    while separator == ",":
        if number:
            text.skip_to(text.at + 1)
        number += 1
        text.next()
        at_line = text.line
        yield number, at_line, _value(text, decoder, path, number)
        separator = text.next()
    if separator != "]":
        what = f"{separator!r} where , or ] belongs" if separator else "the array has no end"
        raise InputError(f"{path}, line {text.line}: not JSON ({what})")
    text.skip_to(text.at + 1)
    if text.next():
        raise InputError(f"{path}, line {text.line}: not JSON (text after the array)")


def _value(text: _Text, decoder: json.JSONDecoder, path: str, number: int) -> Any:
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.at)
            # A number may go on in what was not read yet.
            if end < len(text.text) or text.ended:
                text.skip_to(end)
                return value
            reason = ""
        except (ValueError, RecursionError) as error:
            reason = str(error)
        if len(text.text) - text.at > LONGEST_LINE:
            raise InputError(
                f"{path}, line {text.line}: item {number} has more than {LONGEST_LINE:,} characters"
            )
        if not text.more() and reason:
            raise InputError(f"{path}, line {text.line}, item {number}: not JSON ({reason})")
