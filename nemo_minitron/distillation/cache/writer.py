"""Writes a teacher's cache shard by shard, so that a killed run keeps what it had finished."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_minitron.distillation.cache.format import (
    HEAD,
    MANIFEST,
    Contents,
    File,
    Manifest,
    digest,
    read_contents,
    read_file,
    shard_name,
    shards_of,
)
from nemo_minitron.errors import InputError
from nemo_minitron.files import file_sha256, read_text, remove, replacing, write_text

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What a directory is to become. Shards do not depend on the layout, so another one may finish the work.

    Attributes:
        directory: of the cache.
        contents: of the cache.
        per_shard: sequences in a shard.
        drawn: by split, of how many sequences these are the first (`data.sequences.Schedule`).
    """

    directory: Path
    contents: Contents
    per_shard: int
    drawn: dict[str, int]

    @property
    def shards(self) -> list[range]:
        """The sequences of each shard, by number; those of the train split come first."""
        return shards_of(self.contents.sequences, self.per_shard)

    def to_dict(self) -> dict[str, Any]:
        """For `PLAN`: what must be the same for a run to go on."""
        fields = json.loads(json.dumps(dataclasses.asdict(self.contents)))  # tuples as the file has them
        return {"contents": fields, "per_shard": self.per_shard, "drawn": self.drawn}

    def begin(self) -> None:
        """Say what the directory is to become, and remove what killed writers left; one process calls."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_over in self.directory.glob(".*.tmp"):
            remove(left_over)
        write_text(self.directory / PLAN, json.dumps(self.to_dict(), indent=1) + "\n")

    def finished(self) -> dict[int, File]:
        """The shards that are there, by number.

        Raises:
            InputError: the directory holds shards of another plan.
        """
        if not (self.directory / PLAN).is_file():
            return {}
        self._check_same()
        found = {}
        for number, sequences in enumerate(self.shards):
            file = self._entry(shard_name(number))
            if file is not None and file.sequences == len(sequences):
                found[number] = file
        return found

    def _check_same(self) -> None:
        where = f"run_dir={self.directory.parent}"
        advice = "choose another run_dir or say overwrite=true"
        try:
            before = json.loads(read_text(self.directory / PLAN))
            read_contents(before["contents"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{where}: {self.directory.name}/{PLAN} cannot be read; {advice}") from None
        old, new = (plan.pop("contents") | plan for plan in (before, self.to_dict()))
        different = [name for name in new if old.get(name) != new[name] and name != "teacher"]
        if different:
            name = different[0]
            raise InputError(
                f"{where}: holds an unfinished cache with {name} {old.get(name)}, not {new[name]}; {advice}"
            )

    def _entry(self, name: str) -> File | None:
        """What was noted of a file after it was written; None if it is not there as noted."""
        path = self.directory / name
        try:
            file = read_file(json.loads(read_text(_note(path))))
        except (OSError, ValueError, LookupError, TypeError):
            return None
        whole = file.name == name and path.is_file() and path.stat().st_size == file.bytes
        return file if whole else None

    def write_shard(self, number: int, tokens: Tensor, tensors: dict[str, Tensor]) -> File:
        """Write a shard; it appears whole or not at all.

        Args:
            number: of the shard.
            tokens: its sequences int64 [n, s].
            tensors: what `Contents.tensors` names but the digests, [n, ...]; narrowed to its dtypes here.
        """
        wanted = self.contents.tensors()
        names = torch.frombuffer(bytearray(b"".join(digest(tokens))), dtype=torch.uint8)
        held = {"digests": names.view(len(tokens), -1), **tensors}
        assert held.keys() == wanted.keys(), (held.keys(), wanted.keys())
        for name, (shape, dtype) in wanted.items():
            held[name] = held[name].to("cpu", dtype).contiguous()
            assert held[name].shape == (len(self.shards[number]), *shape), (name, held[name].shape)
        return self._write(shard_name(number), held, len(tokens))

    def write_head(self, head: Tensor) -> File:
        """Write the teacher's output layer [v, h]."""
        return self._write(HEAD, {"head": head.detach().cpu().contiguous()}, 0)

    def _write(self, name: str, tensors: dict[str, Tensor], sequences: int) -> File:
        path = self.directory / name
        with replacing(path) as temporary:
            save_file(tensors, temporary)
            file = File(name, temporary.stat().st_size, file_sha256(temporary), sequences)
        write_text(_note(path), json.dumps(dataclasses.asdict(file)) + "\n")
        return file

    def is_whole(self) -> bool:
        """Whether only the manifest is missing."""
        head = self.contents.form != "hidden" or self._entry(HEAD) is not None
        return head and len(self.finished()) == len(self.shards)

    def finish(self, lm_loss_nats: float) -> Manifest:
        """Write the manifest over what all writers have finished; one process calls."""
        found = self.finished()
        assert len(found) == len(self.shards), f"{len(found)} of {len(self.shards)} shards"
        head = self._entry(HEAD) if self.contents.form == "hidden" else None
        manifest = Manifest(self.contents, lm_loss_nats, tuple(found[n] for n in sorted(found)), head)
        write_text(self.directory / MANIFEST, manifest.to_json())
        return manifest


def _note(path: Path) -> Path:
    return path.with_suffix(".json")
