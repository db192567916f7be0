"""The weight files of a Hugging Face directory, by their headers: names, shapes and dtypes, no weights.

Format: github.com/huggingface/safetensors, README, "Format".
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.config_values import short
from nemo_minitron.checkpoints.untrusted import check_no_pointer, read_json
from nemo_minitron.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Those that are read, by the header's word, and bytes an element.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header states it. `dtype` is safetensors' word, such as "BF16"."""

    shape: list[int]
    dtype: str
    file: Path


def read_headers(directory: Path, where: str) -> dict[str, Tensor]:
    """All tensors of the weight files that belong to a model, by name.

    Files that the index does not name are not looked at: Mistral's `consolidated.safetensors` holds the same weights
    once more.

    Raises:
        InputError: no weights, a file that is missing, half-written, damaged or no regular one, an index that does not
            say what the files hold, a dtype that is not read.
    """
    index = directory / INDEX
    weight_map = _weight_map(read_json(index, where), where) if index.exists() else None
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
        for key, tensor in _header(directory / name, where).items():
            if key in tensors:
                raise InputError(f"{where}: {short(key)} is in {tensors[key].file.name} and in {name}")
            tensors[key] = tensor
    for key, name in (weight_map or {}).items():
        if key not in tensors or tensors[key].file.name != name:
            raise InputError(f"{where}: {name} lacks {short(key)}, which {INDEX} says it holds")
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            legal = ", ".join(DTYPES)
            reason = (
                f"quantised weights are not read, only {legal} are; take the model that they were made from"
            )
            if tensor.dtype == "F64":
                reason = f"must be one of {legal}; save the model in float32"
            raise InputError(f"{where}: {short(key)} has dtype {short(tensor.dtype)}: {reason}")
    return tensors


def _weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: {INDEX} names no weight files (weight_map)")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{where}: weight file {short(name)} is not a plain *.safetensors name in the directory"
            )
    assert isinstance(weight_map, dict)
    return weight_map


def _header(file: Path, where: str) -> dict[str, Tensor]:
    if file.exists() and not file.is_file():
        raise InputError(f"{where}: {file.name} is not a regular file")
    if not file.exists():
        raise InputError(f"{where}: {file.name} is missing{_instead(file.parent)}")
    check_no_pointer(file, where)
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length < _LARGEST_HEADER:
                raise ValueError
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", None)
        texts = {} if metadata is None else metadata.values()
        if not header or not all(isinstance(text, str) for text in texts):
            raise ValueError
        tensors = {name: Tensor(entry["shape"], entry["dtype"], file) for name, entry in header.items()}
        end = _end(header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise InputError(
            f"{where}: {file.name} is half-written or damaged: it has no readable safetensors header"
        ) from None
    if file.stat().st_size != 8 + length + end:
        raise InputError(f"{where}: {file.name} is half-written: its size is not what its header says")
    return tensors


def _end(header: dict[str, Any]) -> int:
    """Where the data ends, in bytes from the header's end.

    Raises:
        ValueError: tensors overlap, leave a gap, or have not the bytes that their shape asks for.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, stop = entry["data_offsets"]
        shape, dtype = entry["shape"], entry["dtype"]
        sizes = (begin, stop, *shape)
        if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError
        if begin != end or (dtype in _BYTES and stop - begin != math.prod(shape) * _BYTES[dtype]):
            raise ValueError
        end = stop
    return end


def _instead(directory: Path) -> str:
    """What lies there in another format, for the message."""
    for pattern, what in (
        (
            "pytorch_model*.bin",
            "a pickle, which is not loaded: save the model with transformers as safetensors",
        ),
        ("consolidated*.safetensors", "Mistral's own format: take the files in Hugging Face's"),
        ("consolidated*.pth", "Meta's own format, a pickle: take the files in Hugging Face's"),
    ):
        if found := sorted(directory.glob(pattern)):
            return f"; {found[0].name} is {what}"
    return " (only safetensors are read)"


def dtype_of(tensors: dict[str, Tensor]) -> str:
    """The dtype that most of the weights have, in torch's word: norms alone may be stored wider."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[elements.most_common(1)[0][0]]


def check_tensors(arch: Architecture, tensors: dict[str, Tensor], where: str) -> None:
    """Whether the weights are those that the config states: transformers would initialise what is missing at random.

    Raises:
        InputError: a weight is missing, has another shape, or is not one of the model's.
    """
    expected = expected_shapes(arch)
    tied = arch.share_embeddings_and_output_weights
    if tied and HEAD in tensors:
        # A second copy, or the only one; whether two agree is seen when they are loaded.
        expected[HEAD] = expected[EMBEDDING]
        if EMBEDDING not in tensors:
            del expected[EMBEDDING]
    for name, shape in expected.items():
        if name not in tensors:
            hint = "" if name != HEAD else " (tie_word_embeddings is not true)"
            raise InputError(f"{where}: the weight files lack {name}, which config.json asks for{hint}")
        if tensors[name].shape != shape:
            raise InputError(
                f"{where}: {name} has shape {tensors[name].shape}, by config.json it has {shape}"
            )
    # Rotary frequencies were once saved, and are computed now.
    for name in tensors:
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{where}: the weights hold a tensor that config.json does not: {name[:100]}")


def expected_shapes(a: Architecture) -> dict[str, list[int]]:
    """All weights of a model by Hugging Face's name; the output layer where it is one of its own."""
    h, queries, keys = a.hidden_size, a.query_size, a.key_value_size
    norms = ("weight", "bias") if a.normalization == "LayerNorm" else ("weight",)
    shapes = {EMBEDDING: [a.vocab_size, h]}
    if not a.share_embeddings_and_output_weights:
        shapes[HEAD] = [a.vocab_size, h]
    shapes |= {f"model.norm.{part}": [h] for part in norms}
    matrices = {
        "self_attn.q_proj": [queries, h],
        "self_attn.k_proj": [keys, h],
        "self_attn.v_proj": [keys, h],
        "self_attn.o_proj": [h, queries],
        **({"mlp.gate_proj": [a.ffn_hidden_size, h]} if a.gated_linear_unit else {}),
        "mlp.up_proj": [a.ffn_hidden_size, h],
        "mlp.down_proj": [h, a.ffn_hidden_size],
    }
    layer = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {
        f"{norm}.{part}": [h] for norm in ("input_layernorm", "post_attention_layernorm") for part in norms
    }
    if a.add_qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": matrices[f"self_attn.{name}_proj"][:1] for name in "qkv"}
    if a.qk_layernorm:
        layer |= {f"self_attn.{name}_norm.weight": [a.kv_channels] for name in "qk"}
    for number in range(a.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes
