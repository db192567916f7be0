"""What the teacher wrote, batch by batch, in files that survive kills."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, write_text

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Written:
    """One sample: token ids of the prompt and of what was written, without the token that ended it.

    `ended`: whether the end-of-document token came. `nats`: the sum of -log p over the new tokens, under the teacher
    at temperature 1, without `top_k` and `top_p`.
    """

    index: int
    prompt: list[int]
    new: list[int]
    ended: bool
    nats: float


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch, which is the same whatever was written before it; below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


class Store:
    """The directory of a run's samples: a manifest that says what decides them, and a JSONL file a batch.

    Args:
        directory: RUN/samples.
        manifest: flat, of plain values: all that the text depends on.
        batches: how many there will be.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], batches: int) -> None:
        self.directory, self.manifest, self.batches = directory, manifest, batches

    def check(self) -> None:
        """Refuse to go on with samples of other settings.

        Raises:
            InputError: names what differs.
        """
        found = self._found()
        if found is None or found == self.manifest:
            return
        keys = sorted(k for k in found.keys() | self.manifest.keys() if found.get(k) != self.manifest.get(k))
        differ = ", ".join(f"{key} {found.get(key)}, now {self.manifest.get(key)}" for key in keys)
        raise InputError(
            f"{self.directory}: holds samples of other settings ({differ}); choose another run_dir or say "
            "overwrite=true"
        )

    def begin(self) -> None:
        """Make the directory ready: what is there of the same settings stays, all else goes. One process calls."""
        if self._found() != self.manifest:
            for path in self.directory.glob("*"):
                path.unlink()
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / MANIFEST, json.dumps(self.manifest, indent=2, sort_keys=True) + "\n")

    def _found(self) -> Any:
        try:
            return json.loads(read_text(self.directory / MANIFEST))
        except (OSError, ValueError, RecursionError):
            return None

    def missing(self) -> list[int]:
        """Numbers of the batches that are yet to be written."""
        return [number for number in range(self.batches) if not self._path(number).is_file()]

    def write(self, number: int, samples: Iterable[Written]) -> None:
        """Keep a batch; it is there as a whole or not at all."""
        write_text(self._path(number), "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))

    def read(self) -> Iterator[Written]:
        """All samples, in order."""
        for number in range(self.batches):
            for line in self._path(number).read_text().splitlines():
                yield Written(**json.loads(line))

    def _path(self, number: int) -> Path:
        return self.directory / f"batch-{number:06d}.jsonl"
