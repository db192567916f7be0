"""Which part of a Megatron-core checkpoint each tensor of a Hugging Face model is, for all six families.

A NeMo 2 checkpoint stacks the layers: `module.decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, ffn]. Its fused
tensors are split here as NeMo's exporters split them (`TransformFns.split_qkv`, `split_fc1` in
nemo/lightning/io/state.py@2.4.1), one layer at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.export.distributed_reader import DistributedReader

EMBEDDING = "module.embedding.word_embeddings.weight"
_HEAD = "module.output_layer.weight"
_FINAL_NORM = "module.decoder.final_layernorm"
_LAYERS = "module.decoder.layers"
_QKV = "self_attention.linear_qkv"
_FC1 = "mlp.linear_fc1"


@dataclass(frozen=True)
class Part:
    """One tensor of the Hugging Face model.

    `key`: of the distributed checkpoint; `layer`: 0-based, None outside of the layers; `part`: "q", "k" or "v" of the
    fused rows of a layer, "gate" or "up" of its first MLP matrix, "all" otherwise.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    layer: int | None = None
    part: str = "all"


def parts(a: Architecture) -> Iterator[Part]:
    """All tensors of a model, embeddings first, in the order of the layers.

    Args:
        a: with a `model_type`.
    """
    table = (a.vocab_size, a.hidden_size)
    yield Part("model.embed_tokens.weight", table, EMBEDDING)
    for layer in range(a.num_layers):
        yield from _layer(a, layer)
    yield from _norm("model.norm", _FINAL_NORM, a, a.hidden_size, None)
    if not a.share_embeddings_and_output_weights:
        yield Part("lm_head.weight", table, _HEAD)


def _layer(a: Architecture, layer: int) -> Iterator[Part]:
    prefix, h, f = f"model.layers.{layer}", a.hidden_size, a.ffn_hidden_size
    fc1, fc2 = f"{_LAYERS}.{_FC1}", f"{_LAYERS}.mlp.linear_fc2.weight"
    yield from _norm(f"{prefix}.input_layernorm", f"{_LAYERS}.{_QKV}.layer_norm", a, h, layer, joint="_")
    yield from _attention(a, layer)
    yield from _norm(f"{prefix}.post_attention_layernorm", f"{fc1}.layer_norm", a, h, layer, joint="_")
    for part in ("gate", "up") if a.gated_linear_unit else ("all",):
        name = "up" if part == "all" else part
        yield Part(f"{prefix}.mlp.{name}_proj.weight", (f, h), f"{fc1}.weight", layer, part)
    yield Part(f"{prefix}.mlp.down_proj.weight", (h, f), fc2, layer)


def _attention(a: Architecture, layer: int) -> Iterator[Part]:
    prefix, fused = f"model.layers.{layer}.self_attn", f"{_LAYERS}.{_QKV}"
    rows = {"q": a.query_size, "k": a.key_value_size, "v": a.key_value_size}
    for part, count in rows.items():
        yield Part(f"{prefix}.{part}_proj.weight", (count, a.hidden_size), f"{fused}.weight", layer, part)
    if a.add_qkv_bias:
        for part, count in rows.items():
            yield Part(f"{prefix}.{part}_proj.bias", (count,), f"{fused}.bias", layer, part)
    if a.qk_layernorm:
        for part in ("q", "k"):
            key = f"{_LAYERS}.self_attention.{part}_layernorm"
            yield from _norm(f"{prefix}.{part}_norm", key, a, a.kv_channels, layer)
    shape = (a.hidden_size, a.query_size)
    yield Part(f"{prefix}.o_proj.weight", shape, f"{_LAYERS}.self_attention.linear_proj.weight", layer)


def _norm(
    name: str, key: str, a: Architecture, size: int, layer: int | None, joint: str = "."
) -> Iterator[Part]:
    kinds = ("weight", "bias") if a.normalization == "LayerNorm" else ("weight",)
    for kind in kinds:
        yield Part(f"{name}.{kind}", (size,), f"{key}{joint}{kind}", layer)


def split(a: Architecture, part: str, fused: Tensor) -> Tensor:
    """What of a layer's fused rows is one part of them.

    Args:
        part: as of `Part`.
        fused: [rows, ...], of all parts: weights, or anything else that each row has, such as its number.
    """
    if part in ("q", "k", "v"):
        # [groups, queries of the group + key + value, head dimension, ...]
        grouped = fused.view(a.num_query_groups, a.heads_per_group + 2, a.kv_channels, *fused.shape[1:])
        cut = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[part]
        return grouped[:, cut].reshape(-1, *fused.shape[1:])
    if part in ("gate", "up"):
        return fused.chunk(2)[part == "up"]
    return fused


def fused_rows(a: Architecture, part: Part) -> int:
    """How many rows the tensor has, of one layer, that a part is of; none of the vocabulary's padding."""
    return {
        **dict.fromkeys(("q", "k", "v"), a.query_size + 2 * a.key_value_size),
        **dict.fromkeys(("gate", "up"), 2 * a.ffn_hidden_size),
    }.get(part.part, part.shape[0])


class Weights:
    """A NeMo 2 checkpoint's weights as Hugging Face tensors, read one at a time."""

    def __init__(self, architecture: Architecture, reader: DistributedReader) -> None:
        self.architecture, self.reader = architecture, reader
        self.parts = {part.name: part for part in parts(architecture)}
        self._fused: tuple[str, int | None, Tensor] | None = None

    def check(self) -> None:
        """Refuse a checkpoint whose tensors are not those of its configuration, before anything is read.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        a = self.architecture
        for part in self.parts.values():
            if part.part in ("k", "v", "up"):
                continue
            found = list(self.reader.size(part.key))
            expected = [fused_rows(a, part), *part.shape[1:]]
            padded = part.key in (EMBEDDING, _HEAD) and found[0] > expected[0] and found[1:] == expected[1:]
            if part.layer is not None:
                expected = [a.num_layers, *expected]
            if found != expected and not padded:
                raise InputError(
                    f"{self.reader.directory}: {part.key} has shape {found}, by the configuration it has {expected}"
                )

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name, in the stored dtype; rows that pad the vocabulary are left out."""
        part = self.parts[name]
        if part.part in ("q", "k", "v"):
            return split(self.architecture, part.part, self._fused_rows(part))
        begin = (part.shape[0] if part.part == "up" else 0, *(0 for _ in part.shape[1:]))
        return self._read(part, begin, part.shape)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The same as one block."""
        yield self.read(name)

    def _read(self, part: Part, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        if part.layer is None:
            return self.reader.read(part.key, begin, size)
        return self.reader.read(part.key, (part.layer, *begin), (1, *size))[0]

    def _fused_rows(self, part: Part) -> Tensor:
        """The fused rows of a layer; q, k and v follow each other, so the last ones are kept."""
        if self._fused is None or self._fused[:2] != (part.key, part.layer):
            size = (fused_rows(self.architecture, part), *part.shape[1:])
            self._fused = None
            self._fused = (part.key, part.layer, self._read(part, (0,) * len(size), size))
        return self._fused[2]
