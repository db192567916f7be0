"""Checkpoints as data: what a directory holds, whether it is whole, and its architecture, read without running it.

A checkpoint is untrusted. NeMo's `io.load_context` instantiates whatever class `context/io.json` names, and a
distributed checkpoint holds pickles; so the context is read as text, and pickles are opened by `untrusted` alone.
"""

import functools
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron import files
from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints import families, foreign
from nemo_minitron.checkpoints.config_keys import check_keys
from nemo_minitron.checkpoints.config_values import short
from nemo_minitron.checkpoints.gguf import is_gguf, to_huggingface
from nemo_minitron.checkpoints.untrusted import (
    check_common,
    check_regular,
    first_sentence,
    read_json,
    table_of_contents,
)
from nemo_minitron.checkpoints.weight_files import check_tensors, dtype_of, read_headers
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.environment import RESULT, rank
from nemo_minitron.errors import InputError
from nemo_minitron.files import file_sha256, user_path

CHECKPOINT = "checkpoint"
# Beside layers that are no model by themselves: the way through them, which only data-flow merges know.
PATH_FILE = "path.json"
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch._C._nn.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "nemo.collections.llm.fn.activation.squared_relu": "squared_relu",
    "nemo.collections.llm.fn.activation.openai_gelu": "gelu_tanh",
}
# What a NeMo config may ask of Megatron-core's model and `models.to_config` does not pass on.
_NOT_BUILT = (
    *("seq_len_interpolation_factor", "rotary_interleaved", "multi_latent_attention", "mtp_num_layers"),
    *(
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "softmax_scale",
        "no_rope_freq",
        "attention_output_gate",
    ),
    *("apply_residual_connection_post_layernorm", "is_hybrid_model"),
)
_EMBEDDING = "module.embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Source:
    """A checkpoint as found on disk.

    `kind`: "huggingface" or "nemo". `seq_length`: the context it was made for, in tokens. `tokenizer`: a directory.
    `dtype`: that of most of the weights on disk, in torch's word. `files`: a Hugging Face directory's weight files.
    """

    path: Path
    kind: str
    architecture: Architecture
    seq_length: int
    tokenizer: Path
    dtype: str = "float32"
    files: tuple[Path, ...] = ()

    def sha256(self) -> str:
        """Identity of the weights: hash over the names and bytes of the weight files and the configuration."""
        if self.kind == "huggingface":
            files = [self.path / "config.json", *self.files]
        else:
            files = [self.path / "context" / "model.yaml", *sorted((self.path / "weights").iterdir())]
        return weights_sha256(files)


def weights_sha256(files: Iterable[Path]) -> str:
    """Hex sha256 over the names and bytes of files, several of which are read at once."""
    total, files = hashlib.sha256(), list(files)
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as threads:
        for file, digest in zip(files, threads.map(file_sha256, files), strict=True):
            total.update(f"{file.name}\0{digest}\n".encode())
    return total.hexdigest()


def find_source(path: str | Path, key: str = "source", data: DataConfig | None = None) -> Source:
    """Recognise a run directory, a NeMo 2 or Hugging Face directory or a GGUF file, and check that it is whole.

    A GGUF file becomes a Hugging Face directory in the cache first.

    Args:
        path: of it.
        key: what the configuration calls it.
        data: says where the cache is.

    Raises:
        InputError: nothing there, no checkpoint, half-written, or a model that is not supported.
    """
    directory = user_path(path)
    where = f"{key}={path}"
    if is_gguf(directory):
        cache = cache_dir(data or DataConfig(), "gguf")
        return _huggingface(to_huggingface(directory, cache, where, families.architecture_of), where)
    if not directory.is_dir():
        raise InputError(f"{where}: {foreign.of_no_directory(directory)}")
    if (directory / CHECKPOINT).is_dir():
        directory = directory / CHECKPOINT
        if not (Path(path) / RESULT).is_file():
            raise InputError(f"{where}: this run did not finish (no result.json)")
    if (directory / "weights").is_dir() or (directory / "context").is_dir():
        return _nemo(directory.resolve(), where)
    if (directory / "config.json").is_file():
        return _huggingface(directory, where)
    raise InputError(f"{where}: {foreign.of_directory(directory)}")


def _huggingface(directory: Path, where: str) -> Source:
    if (directory / PATH_FILE).exists():
        raise InputError(
            f"{where}: holds layers and a path through them with a scale of 0 ({PATH_FILE}), which is no plain model: "
            "it is neither opened nor exported; choose scales that are not 0"
        )
    check_regular(directory, where)
    config = read_json(directory / "config.json", where)
    architecture = families.architecture_of(config, where)
    tensors = read_headers(directory, where)
    if not (directory / "tokenizer_config.json").is_file():
        raise InputError(f"{where}: no tokenizer (tokenizer_config.json)")
    check_tensors(architecture, tensors, where)
    context = families.context_of(config, where)
    _tell_of_unread_keys(check_keys(config, where), where)
    files = tuple(sorted({tensor.file for tensor in tensors.values()}))
    return Source(directory, "huggingface", architecture, context, directory, dtype_of(tensors), files)


@functools.cache
def _said(line: str) -> None:
    """Once a process."""
    print(line, file=sys.stderr, flush=True)


def _tell_of_unread_keys(keys: list[str], where: str) -> None:

    if keys and rank() == 0:
        more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
        _said(f"{where}: config.json: not read: {', '.join(key[:60] for key in keys[:20])}{more}")


def is_unfinished(directory: Path) -> bool:
    """Whether NeMo has marked a checkpoint as one that it writes or deletes."""
    return directory.with_name(f"{directory.name}-unfinished").exists()


def _check_nemo_files(directory: Path, where: str) -> None:
    """Refuse what is half-written, damaged or of another kind, by its files alone."""
    weights, context = directory / "weights", directory / "context"
    for part in (weights, context, *(p for p in context.glob("*") if p.is_dir())):
        if part.is_dir():
            check_regular(part, where)
    needed = [weights / "metadata.json", weights / "common.pt", weights / ".metadata", context / "model.yaml"]
    if missing := [file.relative_to(directory) for file in needed if not file.is_file()]:
        raise InputError(f"{where}: half-written or no NeMo 2 checkpoint: {missing[0]} is missing")
    if is_unfinished(directory):
        raise InputError(f"{where}: half-written: NeMo left it marked as unfinished")
    if (weights / "modelopt_state").exists():
        raise InputError(f"{where}: holds a ModelOpt state, which is a pickle; it is not loaded")
    backend = read_json(weights / "metadata.json", where).get("sharded_backend")
    if backend != "torch_dist":
        raise InputError(f"{where}: metadata.json: sharded_backend {backend!r}: only 'torch_dist' is read")


def _nemo(directory: Path, where: str) -> Source:
    weights, context = directory / "weights", directory / "context"
    _check_nemo_files(directory, where)
    contents = table_of_contents(weights / ".metadata", where)
    check_common(weights / "common.pt", where)
    try:
        model = yaml.safe_load(files.read_text(context / "model.yaml", 1 << 20))
        check_expanded(model)
        config, family = model["config"], families.of_nemo_model(model["_target_"], where)
        if config["vocab_size"] is None:  # NeMo then pads the tokenizer's, and only the weights tell how far
            config["vocab_size"] = contents.state_dict_metadata[_EMBEDDING].size[0]
        architecture, seq_length = _architecture(config, family, where), config["seq_length"]
        if config.get("window_size"):  # converted as full attention, see `families.context_of`
            seq_length = min(seq_length, config["window_size"][0])
        if type(seq_length) is not int or seq_length < 1:
            raise ValueError(f"seq_length {seq_length!r} is not a positive integer")
    except InputError:
        raise
    except (
        yaml.YAMLError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{where}: context/model.yaml cannot be read ({type(error).__name__}: {first_sentence(error)})"
        ) from None
    tokenizer, dtype = _tokenizer_in(context, where), _dtype(contents.state_dict_metadata)
    return Source(directory, "nemo", architecture, seq_length, tokenizer, dtype)


def _dtype(contents: dict[str, Any]) -> str:
    """The dtype that most of the weights have, in torch's word; a step of a training also holds its optimizer."""
    elements: Counter[str] = Counter()
    for name, entry in contents.items():
        if name.startswith("module.") and hasattr(entry, "size"):
            elements[str(entry.properties.dtype).removeprefix("torch.")] += math.prod(entry.size)
    return elements.most_common(1)[0][0] if elements else "float32"


def contents(source: Source) -> Any:
    """The table of contents of a NeMo 2 directory's weights: torch's `Metadata`, opened without running anything.

    Raises:
        InputError: damaged, or not safe to open.
    """
    return table_of_contents(source.path / "weights" / ".metadata", str(source.path))


def check_expanded(value: Any, limit: int = 100_000) -> None:
    """With aliases a short YAML file stands for a value that no memory holds once it is written out in a message."""
    rest = [value]
    while rest:
        limit -= 1
        if limit < 0:
            raise ValueError("its aliases stand for too many values")
        item = rest.pop()
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()


def _architecture(config: dict[str, Any], family: str | None, where: str) -> Architecture:
    if config.get("num_moe_experts"):
        raise InputError(
            f"{where}: num_moe_experts={config['num_moe_experts']}: only dense models are supported"
        )
    activation = _ACTIVATIONS.get((config.get("activation_func") or {}).get("_target_", ""))
    if activation is None:
        raise InputError(f"{where}: activation_func {config.get('activation_func')!r} is not supported")
    for name in _NOT_BUILT:
        if config.get(name):
            raise InputError(f"{where}: context/model.yaml: {name}={short(config[name])} is not supported")
    try:
        return Architecture.from_megatron(
            config, activation=activation, model_type=family, **_rope_scaling(config)
        )
    except InputError as error:
        raise InputError(f"{where}: context/model.yaml: {error}") from None


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's, by the names of NeMo's Llama31Config."""
    if "scale_factor" not in config:
        return {}
    return {ours: kind(config[theirs]) for ours, theirs, kind in families.NEMO_ROPE_SCALING}


def _tokenizer_in(context: Path, where: str) -> Path:
    found = sorted(p.parent for p in context.glob("*/tokenizer_config.json"))
    if (context / "tokenizer_config.json").is_file():
        found.insert(0, context)
    if not found:
        raise InputError(f"{where}: no Hugging Face tokenizer in context/")
    return found[0]
