"""What is done with records that cannot be used: all are counted, then they are refused together or left out."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nemo_minitron.data.records import Record
from nemo_minitron.errors import InputError

REFUSE, SKIP = "refuse", "skip"
_SHOWN = 10
# So many in a row from the beginning are no exceptions; a set of gigabytes is not read to its end for a wrong key.
_ALL_BAD = 1000
T = TypeVar("T")


class BadRecords:
    """The records of a split that cannot be used.

    Args:
        choice: of `data.bad_records`: "refuse" reads on to count them and then refuses; "skip" leaves them out and says
            in one line how many and where.
        what: the setting that named the files, such as "data.train".
        told: the settings that a line was written for, since files are walked several times.
    """

    def __init__(self, choice: str, what: str, told: set[str] | None = None) -> None:
        self._choice, self._what = choice, what
        self._told = set() if told is None else told
        self.read = self.bad = 0
        self._places: list[str] = []
        self._first = ""

    def good(self, records: Iterable[Record], use: Callable[[Record], T]) -> Iterator[T]:
        """What `use` makes of each record; none that is bad and, where they are refused, none after the first of those.

        Args:
            use: raises InputError for a record that cannot be used.

        Raises:
            InputError: as `finish`, early, where nothing is good.
        """
        for record in records:
            self.read += 1
            try:
                if isinstance(record.value, InputError):
                    raise record.value
                found = use(record)
            except InputError as error:
                self.add(record.place, error)
                continue
            if self._choice == SKIP or not self.bad:
                yield found

    def add(self, place: str, error: InputError) -> None:
        """Count one that `good` has let pass and that turned out bad later, or that is no record of a file.

        Raises:
            InputError: as `finish`, where nothing is good.
        """
        self._first = self._first or str(error)
        self.bad += 1
        if len(self._places) < _SHOWN:
            self._places.append(place)
        if self.bad == self.read == _ALL_BAD:
            self._refuse(f"the first {_ALL_BAD:,} records are all like this")

    def finish(self) -> None:
        """Say at the end of the files what was bad.

        Raises:
            InputError: a record is bad and they are refused, or all are.
        """
        if not self.bad:
            return
        count = f"{self.bad:,} of {self.read:,} records"
        if self.bad == self.read:
            self._refuse("the only record" if self.bad == 1 else f"all {self.read:,} records are like this")
        if self._choice == REFUSE:
            also = f" ({self._shown()})" if self.bad > 1 else ""
            self._refuse(
                f"{count} cannot be used{also}; mend them, or leave them out with data.bad_records=skip"
            )
        if self._what not in self._told:
            self._told.add(self._what)
            print(
                f"{self._what}: {count} skipped ({self._shown()}); the first: {self._first}",
                file=sys.stderr,
                flush=True,
            )

    def _refuse(self, count: str) -> None:
        raise InputError(f"{self._first}; {count}")

    def _shown(self) -> str:
        """FILE:3, 17, OTHER:5 and 4 more."""
        shown, before = [], ""
        for place in self._places:
            file, _, number = place.rpartition(":")
            shown.append(number if file == before else place)
            before = file
        more = self.bad - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")


def each_file(
    files: Iterable[str], read: Callable[[str, BadRecords], Iterable[T]], bad: BadRecords
) -> Iterator[T]:
    """What `read` makes of each file, and one account of all that was bad at the end.

    Raises:
        InputError: as `read` and `BadRecords.finish`.
    """
    for file in files:
        yield from read(file, bad)
    bad.finish()
