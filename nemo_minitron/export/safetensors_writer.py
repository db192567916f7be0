"""Safetensors files written one tensor at a time, where the library's own writer wants a whole file in memory.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's length, the header in
JSON with each tensor's dtype, shape and place, the values. Tests read the files with the library.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8  # bytes; of the header, which is padded with spaces
_BLOCK = 16 << 20  # values that are converted at a time
INDEX = "model.safetensors.index.json"


def write_shards(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: int,
    read: Callable[[str], Tensor],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as shards with an index, as `save_pretrained` names them.

    Args:
        shapes: by name, in the order of the files.
        dtype: that they are written in.
        max_shard_bytes: of a file; a tensor that is larger has a file of its own.
        read: gives a tensor by name, in any floating dtype.
        progress: told how many bytes are written so far.

    Returns:
        The files of weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_bytes)
    done = 0
    for file, names in split.filename_to_tensors.items():
        with open(directory / file, "wb") as opened:
            opened.write(_header({name: meta[name] for name in names}))
            for name in names:
                done += write_values(opened.write, read(name), dtype)
                progress(done)
            opened.flush()
            os.fsync(opened.fileno())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / file for file in split.filename_to_tensors]


def write_values(write: Callable[[memoryview], object], tensor: Tensor, dtype: torch.dtype) -> int:
    """Write a tensor's values in another dtype, a block at a time; how many bytes these were."""
    flat, written = tensor.reshape(-1), 0
    for begin in range(0, flat.numel(), _BLOCK):
        block = flat[begin : begin + _BLOCK].to(dtype).view(torch.uint8).numpy()
        write(block.data)
        written += block.nbytes
    return written


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
