"""Tensors out of a distributed checkpoint, a slice at a time, whatever layout it was written under.

torch's own reader and resharding do the work (torch.distributed.checkpoint@2.13); what is done here is to ask for one
slice instead of a whole state dict, and to hand it a table of contents that was opened without running anything.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_minitron.errors import InputError


class DistributedReader:
    """The tensors of one directory of shards.

    Args:
        directory: a NeMo 2 checkpoint's `weights/`.
        contents: its table of contents, as `checkpoints.contents_of` opens it.
    """

    def __init__(self, directory: Path, contents: Metadata) -> None:
        self.directory = directory
        self._entries = contents.state_dict_metadata
        self._files = FileSystemReader(directory)
        self._files.set_up_storage_reader(contents, is_coordinator=True)

    def size(self, key: str) -> torch.Size:
        """The global shape of a tensor.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        return self._entry(key).size

    def dtype(self, key: str) -> torch.dtype:
        """The stored dtype of a tensor.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        return self._entry(key).properties.dtype

    def read(self, key: str, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box of a tensor, in its stored dtype, on the CPU.

        Besides the result one stored chunk is in memory, which is one rank's part of one layer's tensor.

        Args:
            begin, size: by axis of the global tensor.

        Raises:
            InputError: no such tensor, or the box is not inside of it.
        """
        entry = self._entry(key)
        inside = len(begin) == len(size) == len(entry.size) and all(
            b >= 0 and b + s <= n for b, s, n in zip(begin, size, entry.size, strict=True)
        )
        if not inside:
            raise InputError(
                f"{self.directory}: {key} has shape {list(entry.size)}; by the configuration it has values at "
                f"{list(begin)} of shape {list(size)}"
            )
        box = ChunkStorageMetadata(torch.Size(begin), torch.Size(size))
        items = create_read_items_for_chunk_list(key, entry, [box])
        target = torch.empty(size, dtype=entry.properties.dtype)
        self._files.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(f"{self.directory}: the weights lack {key}")
        return entry


class _Into(DefaultLoadPlanner):
    """Lets the reader write into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that a stored chunk fills."""
        result = self.target
        for axis, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            result = result.narrow(axis, begin, length)
        return result

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        """Nothing is left to do: `resolve_tensor` gave a view."""
