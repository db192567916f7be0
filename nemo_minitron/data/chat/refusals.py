"""Samples that cannot be trained on: how many, which, and what is done about them."""

import logging

from nemo_minitron.errors import InputError

logger = logging.getLogger("nemo_minitron")
REFUSE, SKIP = "refuse", "skip"
_TOLD = 10


class Refusals:
    """Gathers refused samples of one set.

    Args:
        bad_records: "refuse" ends the work once all have been seen, "skip" leaves them out.
    """

    def __init__(self, bad_records: str) -> None:
        self._skips = bad_records == SKIP
        self._first: InputError | None = None
        self._places: list[str] = []
        self.count = 0

    def add(self, where: str, error: InputError) -> None:
        """One more.

        Args:
            where: "FILE, line N".
            error: names it too.
        """
        self._first = self._first or error
        self.count += 1
        if self.count <= _TOLD:
            self._places.append(where)

    def end(self, samples: int, what: str) -> None:
        """All have been seen: refuse the set, or say what was left out.

        Args:
            samples: that were seen.
            what: they are, such as "conversations".

        Raises:
            InputError: under "refuse", where there is one; names the first ten, and why the first one is.
        """
        if self._first is None:
            return
        others = f"; also at {', '.join(self._places[1:])}" if self.count > 1 else ""
        more = f" and {self.count - _TOLD} more" if self.count > _TOLD else ""
        counted = f"{self.count} of {samples} {what} cannot be trained on"
        if self._skips:
            logger.warning("%s and are left out: %s%s%s", counted, self._first, others, more)
        elif self.count == 1:
            raise self._first
        else:
            raise InputError(f"{self._first}{others}{more}: {counted}; data.bad_records=skip leaves them out")
