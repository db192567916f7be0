"""A GGUF file out of a NeMo 2 checkpoint, for llama.cpp, a tensor at a time.

gguf's own writer, names and quantisation do the work (gguf@0.19). What llama.cpp wants otherwise than transformers:
Llama's queries and keys rotate neighbouring channels instead of the two halves of a head; Gemma's and Nemotron's norms
have their offset of 1 in the weight; Llama 3.1's scaling is a factor for each frequency
(https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py).
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.export.gguf_tokenizer import Vocabulary
from nemo_minitron.export.huggingface import Model
from nemo_minitron.export.to_disk import Write, to_disk, write_values

# Hugging Face's model_type -> general.architecture. llama.cpp has no Mistral: it computes the same as Llama.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "nemotron": "nemotron",
}
KINDS = ("F32", "F16", "BF16", "Q8_0")
# What a matrix becomes whose rows the blocks of its type do not divide.
_UNEVEN = "F16"
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Report:
    """What was written. `kept`: matrices of another type than the one asked for, by name, with their row's length."""

    kind: str
    bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def kind_of(kind: str, shape: tuple[int, ...]) -> str:
    """The type that a tensor is written in: vectors are float32, and rows must be whole blocks."""
    import gguf

    if len(shape) == 1:
        return "F32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if shape[-1] % block == 0 else _UNEVEN


def write(
    model: Model,
    vocabulary: Vocabulary,
    file: Path,
    kind: str,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Write the file; besides one tensor and its converted form nothing of the weights is in memory.

    Args:
        kind: one of `KINDS`, of the matrices.
        progress: told the bytes of weights written so far.

    Raises:
        RuntimeError: a value that float16 cannot hold.
    """
    import gguf

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    a, report = model.weights.architecture, Report(kind)
    assert a.model_type is not None
    writer = gguf.GGUFWriter(file, ARCHITECTURES[a.model_type], use_temp_file=False)
    _add_sizes(writer, model)
    _add_kind(writer, kind)
    vocabulary.add(writer)
    factors = _rope_factors(model.config) if a.rope_scaling_factor is not None else None
    if factors is not None:
        _announce(writer, _ROPE_FACTORS, tuple(factors.shape), "F32")
    shapes = {name: part.shape for name, part in model.weights.parts.items()}
    names = {name: name_of(model, name) for name in shapes}
    kinds = {name: kind_of(kind, shape) for name, shape in shapes.items()}
    report.kept = {names[n]: s[-1] for n, s in shapes.items() if kinds[n] != kind and len(s) > 1}
    for name, shape in shapes.items():
        _announce(writer, names[name], shape, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # One file, unless the writer is told to split; its own way to write a tensor wants the whole of it converted.
    assert writer.fout is not None
    (opened,) = writer.fout
    with opened, to_disk(opened) as write:
        writer.write_padding(opened, opened.tell())
        for theirs, size in _write_tensors(write, model, factors, names, kinds):
            writer.write_padding(opened, size)
            report.bytes += size if theirs != _ROPE_FACTORS else 0
            progress(report.bytes)
    return report


def _write_tensors(
    write: Write, model: Model, factors: Tensor | None, names: Mapping[str, str], kinds: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """Each tensor's name in the file and the bytes that it took, once it is written."""
    if factors is not None:
        yield _ROPE_FACTORS, _write_tensor(write, factors, "F32", _ROPE_FACTORS)
    for name, theirs in names.items():
        yield theirs, _write_tensor(write, as_llama_cpp(model, name), kinds[name], theirs)


def _write_tensor(write: Write, tensor: Tensor, kind: str, name: str) -> int:
    """Bytes that the tensor took."""
    if kind in _DTYPES:
        return write_values(write, tensor, _DTYPES[kind], lambda block: _check_half(block, name))
    values = packed(tensor.float(), kind, name)
    write(values.reshape(-1).data)
    return int(values.nbytes)


def _check_half(block: Tensor, name: str) -> None:
    if block.dtype == torch.float16 and not all(map(math.isfinite, map(float, block.aminmax()))):
        raise RuntimeError(f"{name}: a value is beyond float16's 65504; choose BF16 or F32")


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import gguf
    import numpy as np

    raw = gguf.GGMLQuantizationType[kind]
    stored = gguf.quant_shape_to_byte_shape(shape, raw)
    size = int(np.prod(stored, dtype=np.int64))
    # As bytes, from which the writer finds the shape again.
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=raw)


def name_of(model: Model, name: str) -> str:
    """llama.cpp's name of a tensor, by gguf's own table."""
    a = model.weights.architecture
    table = _names(ARCHITECTURES[str(a.model_type)], a.num_layers)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


@cache
def _names(architecture: str, layers: int) -> Any:
    import gguf

    by_name = {theirs: number for number, theirs in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(by_name[architecture], layers)


def as_llama_cpp(model: Model, name: str) -> Tensor:
    """A tensor as it is stored, in the order and with the offset that llama.cpp has."""
    a, tensor = model.weights.architecture, model.weights.read(name)
    if a.model_type in ("gemma", "nemotron") and name.endswith("norm.weight"):
        return tensor.float() + 1
    heads = 0
    if ARCHITECTURES[str(a.model_type)] == "llama":
        heads = {"q_proj": a.num_attention_heads, "k_proj": a.num_query_groups}.get(name.split(".")[-2], 0)
    if heads:
        # [heads, two halves, half a head, ...] to [heads, half a head, two neighbours, ...]
        return (
            tensor.view(heads, 2, a.kv_channels // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        )
    return tensor


def packed(tensor: Tensor, kind: str, name: str) -> Any:
    """A tensor's bytes in one of llama.cpp's types, as numpy holds them.

    Args:
        tensor: float32.
        name: for a refusal.

    Raises:
        RuntimeError: a value that float16 cannot hold.
    """
    import gguf

    if kind in _DTYPES:
        values = tensor.to(_DTYPES[kind]).contiguous()
        _check_half(values, name)
        return values.view(torch.uint8).numpy()
    return gguf.quants.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[kind])


def _add_sizes(writer: Any, model: Model) -> None:
    a, name = model.weights.architecture, str(model.weights.architecture.model_type)
    writer.add_type("model")
    writer.add_name(f"{name} {a.parameters() / 1e6:.1f}M")
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(model.config["max_position_embeddings"])
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.ffn_hidden_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_query_groups)
    # Always: after pruning it is not hidden_size / heads, which llama.cpp would take.
    writer.add_key_length(a.kv_channels)
    writer.add_value_length(a.kv_channels)
    writer.add_rope_dimension_count(int(a.kv_channels * a.rotary_percent))
    writer.add_rope_freq_base(a.rotary_base)
    if a.rope_scaling_factor is not None:
        # Readers find Llama 3.1's settings again from the factors, up to this one.
        writer.add_rope_scaling_orig_ctx_len(a.rope_original_context)
    if a.normalization == "LayerNorm":
        writer.add_layer_norm_eps(a.layernorm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(a.layernorm_epsilon)


def _add_kind(writer: Any, kind: str) -> None:
    import gguf

    name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(int(gguf.LlamaFileType[name]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope_factors(config: Mapping[str, Any]) -> Tensor:
    """What llama.cpp divides each rotary frequency by, float32 [head_dim / 2]: transformers' own scaling."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(**config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = theirs.rope_theta ** -(torch.arange(0, theirs.head_dim, 2).double() / theirs.head_dim)
    return (plain / scaled.double()).float()


def rounding(kind: str) -> Callable[[Tensor], Tensor]:
    """What becomes of a weight, float32 [..., in], in a file of a type."""
    return lambda weight: unpacked(
        packed(weight, kind_of(kind, tuple(weight.shape)), "a weight"), kind, weight
    )


def unpacked(values: Any, kind: str, like: Tensor) -> Tensor:
    """The float32 values of packed bytes, by gguf's own dequantisation, in the shape of the tensor."""
    import gguf

    theirs = gguf.GGMLQuantizationType[kind_of(kind, tuple(like.shape))]
    return torch.from_numpy(gguf.quants.dequantize(values, theirs)).view(like.shape)
