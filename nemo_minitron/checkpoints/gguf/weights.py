"""The weights of a GGUF file as Hugging Face names, lays out and stores them, one tensor in memory at a time.

Dequantised with gguf's own functions, named by gguf's own maps (gguf 0.19.0). What llama.cpp's converter did to the
numbers is undone: the order of rows in q and k (llama only), and the one that it added to the norms of Gemma and
Nemotron, whose weights are offsets from one in Hugging Face's files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.gguf.reader import GGUFFile, TensorEntry
from nemo_minitron.errors import InputError

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
# Tensors that hold nothing of the model: rotary frequencies, which config.json gives.
_COMPUTED = ("rope_freqs.weight", "attn_rot_embd.weight")
_ROWS_BYTES = 64 << 20


@dataclass(frozen=True)
class Weight:
    """A weight of the Hugging Face model, and the tensor that it comes from.

    Attributes:
        shape: as config.json gives it.
        heads: the number of heads whose rows are to be put back in order, 0 if none.
        offset: what is to be subtracted.
    """

    name: str
    shape: tuple[int, ...]
    tensor: TensorEntry
    heads: int = 0
    offset: float = 0.0


def dtype_of(file: GGUFFile) -> str:
    """The dtype of config.json: the matrices' own if all have the same plain one; float32 for quantised weights."""
    kinds = {tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return _PLAIN.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def table(file: GGUFFile, a: Architecture, where: str) -> list[Weight]:
    """Every weight of the model with its tensor.

    Raises:
        InputError: a tensor is missing, has another shape, is not part of such a model, or cannot be dequantised.
    """
    import gguf

    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[_architecture(file)]
    names = gguf.get_tensor_name_map(architecture, a.num_layers)
    rest = {name: tensor for name, tensor in file.tensors.items() if not name.endswith(_COMPUTED)}
    weights = []
    for name, shape in _shapes(a):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensor = rest.pop(theirs, None)
        if tensor is None:
            raise InputError(f"{where}: lacks the tensor {theirs}")
        if tensor.shape != shape:
            raise InputError(
                f"{where}: {theirs} has shape {list(tensor.shape)}, by the metadata it has {list(shape)}"
            )
        weights.append(_weight(a, _architecture(file), name, tensor))
    if rest:
        raise InputError(f"{where}: holds the tensor {sorted(rest)[0][:200]!r}, which is not converted")
    _check_kinds(weights, where)
    return weights


def _architecture(file: GGUFFile) -> str:
    return str(file.metadata["general.architecture"])


def _weight(a: Architecture, architecture: str, name: str, tensor: TensorEntry) -> Weight:
    heads = 0
    if architecture == "llama" and ".q_proj." in name:
        heads = a.num_attention_heads
    elif architecture == "llama" and ".k_proj." in name:
        heads = a.num_query_groups
    offset = 1.0 if architecture in ("gemma", "nemotron") and name.endswith("norm.weight") else 0.0
    return Weight(name, tensor.shape, tensor, heads, offset)


def _check_kinds(weights: list[Weight], where: str) -> None:
    """One block of each type that occurs is dequantised, since gguf cannot do it for all that it names."""
    import gguf

    for kind in {weight.tensor.kind for weight in weights}:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(f"{where}: weights of type {kind.name}: gguf cannot dequantise them") from None


def _shapes(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all of the model's weights, in transformers' words."""
    h, ffn = a.hidden_size, a.ffn_hidden_size
    queries, keys = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    norm_bias = a.normalization == "LayerNorm"
    yield "model.embed_tokens.weight", (a.vocab_size, h)
    for layer in range(a.num_layers):
        p = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(p + name, h, norm_bias)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{p}self_attn.{name}.weight", (rows, h)
            if a.add_qkv_bias:
                yield f"{p}self_attn.{name}.bias", (rows,)
        yield f"{p}self_attn.o_proj.weight", (h, queries)
        if a.qk_layernorm:
            yield f"{p}self_attn.q_norm.weight", (a.kv_channels,)
            yield f"{p}self_attn.k_norm.weight", (a.kv_channels,)
        if a.gated_linear_unit:
            yield f"{p}mlp.gate_proj.weight", (ffn, h)
        yield f"{p}mlp.up_proj.weight", (ffn, h)
        yield f"{p}mlp.down_proj.weight", (h, ffn)
    yield from _norm("model.norm", h, norm_bias)
    if not a.share_embeddings_and_output_weights:
        yield "lm_head.weight", (a.vocab_size, h)


def _norm(name: str, size: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def numbers(file: GGUFFile, tensor: TensorEntry) -> Any:
    """A tensor dequantised: numpy float32, of the tensor's shape."""
    from gguf.quants import dequantize

    stored = np.memmap(file.path, np.uint8, "r", tensor.start, (tensor.size,))
    rows = stored.reshape(-1, tensor.size // max(1, int(np.prod(tensor.shape[:-1]))))
    out = np.empty((len(rows), tensor.shape[-1]), np.float32)
    step = max(1, _ROWS_BYTES // (4 * tensor.shape[-1]))
    for begin in range(0, len(rows), step):
        # What overflows is not finite, and is refused by whoever asked.
        with np.errstate(all="ignore"):
            out[begin : begin + step] = dequantize(
                np.ascontiguousarray(rows[begin : begin + step]), tensor.kind
            )
    return out.reshape(tensor.shape)


def values(file: GGUFFile, weight: Weight, where: str) -> Any:
    """A weight as transformers has it: numpy float32, of the weight's shape.

    Raises:
        InputError: a value that is not finite.
    """
    found = numbers(file, weight.tensor)
    if weight.offset:
        found -= weight.offset
    if not np.isfinite(found).all():
        raise InputError(f"{where}: {weight.tensor.name} holds a value that is not finite")
    if weight.heads:
        # llama.cpp rotates neighbours, Hugging Face's models the two halves of a head.
        found = found.reshape(weight.heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
    return found


def write_safetensors(file: GGUFFile, weights: list[Weight], dtype: str, to: Path, where: str) -> None:
    """Write the weights as one safetensors file, whose format lets them be written one after another.

    Args:
        dtype: "float32", "float16" or "bfloat16".
    """
    import torch

    name, width = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        begin, end = end, end + int(np.prod(weight.shape)) * width
        header[weight.name] = {"dtype": name, "shape": list(weight.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(to, "wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for weight in weights:
            tensor = torch.from_numpy(np.ascontiguousarray(values(file, weight, where)))
            tensor.to(getattr(torch, dtype)).view(torch.uint8).numpy().tofile(opened)
