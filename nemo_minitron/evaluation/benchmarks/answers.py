"""A model's answers to requests, kept in a JSONL file: who asks the same weights the same again gets the same."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Answers:
    """Answers by key; each `add` is on the disk when it returns, and a line that a kill cut short is left out.

    Args:
        file: None: they are kept in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.found: dict[str, Any] = {}
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self.found[key] = value
        self.before = len(self.found)

    @staticmethod
    def key(request: list[Any]) -> str:
        """Of a request in plain values."""
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def add(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        """Keep answers."""
        self.found.update(zip(keys, values, strict=True))
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = zip(keys, values, strict=True)
        # A leading line end: what a kill left of the last line stays a line of its own.
        text = "\n" + "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.file, "a", encoding="utf-8") as opened:
            opened.write(text)

    def known_or_asked(
        self,
        requests: Sequence[tuple[str, Any, int]],
        at_once: int,
        ask: Callable[[list[Any]], Sequence[Any]],
        more: Callable[[int], object],
        done: Callable[[int], object],
    ) -> list[Any]:
        """Answers by request: those from before, and new ones in slices, each kept as soon as it is there.

        Args:
            requests: (key, request, length); equal keys are asked once, the longest first, as models batch them.
            at_once: requests of a slice.
            more, done: told how many are to be asked, and of each slice how many were.
        """
        new = {key: (request, length) for key, request, length in requests if key not in self}
        order = sorted(new, key=lambda key: -new[key][1])
        more(len(order))
        for begin in range(0, len(order), at_once):
            part = order[begin : begin + at_once]
            self.add(part, ask([new[key][0] for key in part]))
            done(len(part))
        return [self[key] for key, _, _ in requests]
