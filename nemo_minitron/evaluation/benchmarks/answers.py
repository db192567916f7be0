"""A model's answers to requests, kept in a JSONL file: who asks the same weights the same again gets the same."""

import hashlib
import json
from collections.abc import Sequence
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
