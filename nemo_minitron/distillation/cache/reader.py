"""A finished cache of a teacher's states, opened to be read: any sequence, in any order, on any rank."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_minitron.distillation.cache.format import (
    DIGEST_BYTES,
    HEAD,
    MANIFEST,
    Contents,
    File,
    Manifest,
    digest,
    read_manifest,
)
from nemo_minitron.distillation.loss.losses import TopKTeacher
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.files import check_regular, file_sha256, user_path

CACHE = "cache"
_OPEN_SHARDS = 64
_PROGRESS_EVERY_S = 10.0
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class TeacherCache:
    """Reads what `cache_writer` wrote. Shards are mapped into memory, never loaded whole.

    Args:
        path: a run directory of recipes/cache_teacher.py, or the cache in it.

    Raises:
        InputError: no cache, an unfinished one, or files that are missing or of another size.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = f"teacher_cache={path}"
        self.directory = _directory(user_path(path), self.where)
        self.manifest: Manifest = read_manifest(self.directory / MANIFEST, self.where)
        self._check_sizes()
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._opened)

    @property
    def contents(self) -> Contents:
        """What it holds."""
        return self.manifest.contents

    def _files(self) -> list[File]:
        head = self.manifest.head
        return [*self.manifest.shards, *([] if head is None else [head])]

    def _check_sizes(self) -> None:
        for file in self._files():
            path = self.directory / file.name
            if not path.is_file():
                raise InputError(f"{self.where}: {file.name} is missing")
            if path.stat().st_size != file.bytes:
                raise InputError(
                    f"{self.where}: {file.name} is corrupt: it has {path.stat().st_size} bytes, not {file.bytes}"
                )

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest's, which reads all of the cache once; with progress.

        Raises:
            InputError: names the corrupt file.
        """
        tell = _Progress(f"verifying {self.directory}", sum(file.bytes for file in self._files()))
        done = 0
        for file in self._files():
            found = file_sha256(self.directory / file.name)
            if found != file.sha256:
                raise InputError(
                    f"{self.where}: {file.name} is corrupt: its sha256 is {found[:16]}..., written was "
                    f"{file.sha256[:16]}..."
                )
            done += file.bytes
            tell(done)

    def _opened(self, name: str) -> Any:
        try:
            check_regular(self.directory / name)
            return safe_open(self.directory / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.where}: {name} cannot be read ({first_line(error)})") from None

    @functools.cached_property
    def _index(self) -> tuple[Any, Any]:
        """The digests of all sequences in their order, and the shard and row of each."""
        names, places = [], []
        for number, file in enumerate(self.manifest.shards):
            shard = self._open(file.name)
            self._check_tensors(shard, file)
            names.append(shard.get_tensor("digests").numpy().reshape(-1))
            rows = np.arange(file.sequences)
            places.append(np.stack([np.full_like(rows, number), rows], axis=1))
        found = np.concatenate(names).view(np.dtype((np.void, DIGEST_BYTES)))
        order = np.argsort(found, kind="stable")
        return found[order], np.concatenate(places)[order]

    def _check_tensors(self, shard: Any, file: File) -> None:
        wanted = {
            name: ([file.sequences, *shape], _NAMES[dtype])
            for name, (shape, dtype) in self.contents.tensors().items()
        }
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        found = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        if found != wanted:
            raise InputError(f"{self.where}: {file.name} holds {found}, by the manifest it must be {wanted}")

    def _find(self, names: list[bytes]) -> tuple[Any, Any]:
        """Row of the index of each digest, and whether it is there."""
        held, _ = self._index
        asked = np.frombuffer(b"".join(names), dtype=held.dtype)
        rows = np.searchsorted(held, asked).clip(max=len(held) - 1)
        return rows, held[rows] == asked

    def missing(self, tokens: Tensor) -> list[int]:
        """Which of the sequences [n, s] the cache lacks, by row."""
        return np.flatnonzero(~self._find(digest(tokens))[1]).tolist()

    def _rows(self, tokens: Tensor) -> Iterator[tuple[Any, int]]:
        """The open shard and the row in it of each sequence [n, s].

        Raises:
            InputError: a sequence is not there.
        """
        rows, there = self._find(digest(tokens))
        for i in range(len(tokens)):
            if not there[i]:
                raise InputError(f"{self.where}: lacks the sequence that begins {tokens[i, :8].tolist()}")
            number, row = self._index[1][rows[i]].tolist()
            yield self._open(self.manifest.shards[number].name), row

    def hidden(self, tokens: Tensor, part: slice = slice(None)) -> Tensor:
        """What enters the teacher's output layer, [s, b, h], for sequences tokens [b, s]; form "hidden".

        Args:
            part: of the sequence, such as a tensor-parallel rank's under sequence parallelism: [s/tp, b, h].

        Raises:
            InputError: a sequence is not there.
        """
        found = [shard.get_slice("hidden")[row : row + 1, part][0] for shard, row in self._rows(tokens)]
        return torch.stack(found, dim=1)

    def head(self, rows: slice) -> Tensor:
        """Rows of the teacher's output layer, [rows, h]; form "hidden"."""
        return self._open(HEAD).get_slice("head")[rows]

    def top_k(self, tokens: Tensor, k: int, tail: bool) -> TopKTeacher:
        """The teacher's k most probable tokens [s, b, k] for sequences tokens [b, s]; form "top_k".

        Args:
            k: at most the cache's; what lies between joins the tail.
            tail: whether the tail is wanted, at the temperature that the cache was written for.

        Raises:
            InputError: a sequence is not there.
        """
        found = [
            [shard.get_slice(name)[row : row + 1][0] for name in ("values", "indices", "tail_logsumexp")]
            for shard, row in self._rows(tokens)
        ]
        values, indices, rest = (torch.stack(each, dim=1) for each in zip(*found, strict=True))
        values, temperature = values.float(), self.contents.temperature
        if tail and k < values.shape[-1]:
            assert temperature is not None
            rest = torch.logaddexp(rest, (values[..., k:] / temperature).logsumexp(-1))
        return TopKTeacher(values[..., :k], indices[..., :k], rest if tail else None)


class _Progress:
    """Says now and then how far a long work is, and nothing of a short one."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.told = label, total, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.told > _PROGRESS_EVERY_S:
            self.told = time.monotonic()
            print(f"{self.label}: {done / self.total:.0%}", file=sys.stderr, flush=True)


def covers(cache: TeacherCache, sequences: Callable[[int], Tensor], count: int, what: str) -> None:
    """Refuse a cache that lacks some of the sequences 0 to count - 1; with progress.

    Args:
        sequences: the tokens [s] of a number.
        what: they are called.

    Raises:
        InputError: says how many are missing, and which is the first.
    """
    missing: list[int] = []
    tell = _Progress(f"looking up {what} sequences", count)
    for begin in range(0, count, 256):
        numbers = range(begin, min(begin + 256, count))
        missing += [begin + row for row in cache.missing(torch.stack([sequences(i) for i in numbers]))]
        tell(numbers.stop)
    if missing:
        raise InputError(
            f"{cache.where}: lacks {len(missing)} of the {count} {what} sequences of this run, the first is number "
            f"{missing[0]}; it holds those of {cache.contents.samples} of its own schedule: write it with this run's "
            "data and distill settings, or with more cache.train_samples and cache.valid_samples"
        )


def _directory(path: Path, where: str) -> Path:
    for directory in (path, path / CACHE):
        if (directory / MANIFEST).is_file():
            return directory.resolve()
    if not path.is_dir():
        raise InputError(f"{where}: no such directory")
    if (path / CACHE).is_dir():
        raise InputError(
            f"{where}: unfinished: {CACHE}/{MANIFEST} is missing; the same recipes/cache_teacher.py command goes on"
        )
    raise InputError(f"{where}: no teacher's cache here ({MANIFEST}); recipes/cache_teacher.py writes one")
