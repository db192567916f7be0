"""Safetensors files written one tensor at a time, where the library's own writer wants a whole file in memory.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's length, the header in
JSON with each tensor's dtype, shape and place, the values. Tests read the files with the library.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemo_minitron.export.to_disk import to_disk, write_values

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8  # bytes; of the header, which is padded with spaces
INDEX = "model.safetensors.index.json"

Blocks = Callable[[str], Iterable[Tensor]]


def write_shards(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: int,
    blocks: Blocks,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as shards with an index, as `save_pretrained` names them.

    A file has its name when all of it is on the disk; one that is there is taken as it is, so that a writing that was
    killed goes on at the file it was in.

    Args:
        shapes: by name, in the order of the files.
        dtype: that they are written in.
        max_shard_bytes: of a file; a tensor that is larger has a file of its own.
        blocks: gives a tensor by name, in any floating dtype: as blocks of rows that follow each other.
        progress: told how many bytes are written so far.

    Returns:
        The files of weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_bytes)
    done = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {name: meta[name] for name in names}
        if not (directory / file).exists():
            _write(directory / file, tensors, blocks, _from(done, progress))
        done += sum(map(_bytes, tensors.values()))
        progress(done)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / file for file in split.filename_to_tensors]


def _from(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    """Tells `progress` of the bytes of a file, after the `before` bytes of the files before it."""
    return lambda written: progress(before + written)


def _write(
    file: Path, tensors: Mapping[str, Tensor], blocks: Blocks, progress: Callable[[int], None]
) -> None:
    unfinished = file.with_name(f".{file.name}.part")
    done = 0
    with open(unfinished, "wb") as opened, to_disk(opened) as write:
        opened.write(_header(tensors))
        for name, tensor in tensors.items():
            for block in blocks(name):
                done += write_values(write, block, tensor.dtype)
                progress(done)
    os.replace(unfinished, file)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + _bytes(tensor)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
