"""Checkpoints as data: what a directory holds, whether it is whole, and its architecture, read without running it.

A checkpoint is untrusted. NeMo's `io.load_context` instantiates whatever class `context/io.json` names, and a
distributed checkpoint holds pickles; so the context is read as text, and pickles are opened with a list of what they
may name (`weights_may_only_be_tensors`).
"""

import dataclasses
import enum
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.gguf import is_gguf, to_huggingface
from nemo_minitron.config import DataConfig, cache_dir
from nemo_minitron.errors import InputError
from nemo_minitron.nemo import families

CHECKPOINT = "checkpoint"
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch._C._nn.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "nemo.collections.llm.fn.activation.squared_relu": "squared_relu",
    "nemo.collections.llm.fn.activation.openai_gelu": "gelu_tanh",
}
_EMBEDDING = "module.embedding.word_embeddings.weight"
# What the table of contents of a distributed checkpoint names: dataclasses and enums of these packages, and
_PICKLED_CLASSES_OF = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_PICKLED_BESIDE = {
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint as found on disk.

    `kind`: "huggingface" or "nemo". `seq_length`: the context it was made for, in tokens. `tokenizer`: a directory.
    """

    path: Path
    kind: str
    architecture: Architecture
    seq_length: int
    tokenizer: Path

    def sha256(self) -> str:
        """Identity of the weights: hash over the names and bytes of the weight files and the configuration."""
        if self.kind == "huggingface":
            files = [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]
        else:
            files = [self.path / "context" / "model.yaml", *sorted((self.path / "weights").iterdir())]
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.name}\0{_sha256(file)}\n".encode())
        return total.hexdigest()


def _sha256(file: Path) -> str:
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_source(path: str | Path, key: str = "source") -> Source:
    """Recognise a run directory, a NeMo 2 or Hugging Face directory or a GGUF file, and check that it is whole.

    A GGUF file becomes a Hugging Face directory in the cache first.

    Raises:
        InputError: nothing there, no checkpoint, half-written, or a model that is not supported.
    """
    directory = Path(path).expanduser()
    where = f"{key}={path}"
    if is_gguf(directory):
        cache = cache_dir(DataConfig(), "gguf")
        return _huggingface(to_huggingface(directory, cache, where, families.architecture_of), where)
    if not directory.is_dir():
        raise InputError(f"{where}: no such directory")
    if (directory / CHECKPOINT).is_dir():
        directory = directory / CHECKPOINT
        if not (Path(path) / "result.json").is_file():
            raise InputError(f"{where}: this run did not finish (no result.json)")
    if (directory / "weights").is_dir() or (directory / "context").is_dir():
        return _nemo(directory.resolve(), where)
    if (directory / "config.json").is_file():
        return _huggingface(directory, where)
    raise InputError(
        f"{where}: no checkpoint here; legal are a run directory, a NeMo 2 directory (weights/, context/), a "
        "Hugging Face directory (config.json, *.safetensors) and a GGUF file"
    )


def _huggingface(directory: Path, where: str) -> Source:
    from nemo_minitron.nemo.huggingface import check_shapes

    config = _read_json(directory / "config.json", where)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed(_read_json(index, where), where)
    else:
        names = ["model.safetensors"]
    shapes: dict[str, Any] = {}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{where}: weight file {name!r} is not a plain *.safetensors name in the directory"
            )
        held = _safetensors_shapes(directory / name)
        if held is None:
            raise InputError(f"{where}: {name} is missing or half-written (only safetensors are read)")
        shapes |= held
    if not (directory / "tokenizer_config.json").is_file():
        raise InputError(f"{where}: no tokenizer (tokenizer_config.json)")
    architecture = families.architecture_of(config, where)
    check_shapes(architecture, shapes, where)
    return Source(directory, "huggingface", architecture, families.context_of(config, where), directory)


def _indexed(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index of weights names."""
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: model.safetensors.index.json names no weight files (weight_map)")
    return sorted(set(names))


def _safetensors_shapes(file: Path) -> dict[str, Any] | None:
    """Shapes by name, if the header is readable and the data that it promises is there."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length < 100 << 20:
                return None
            header = json.loads(opened.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in entries.values())
        whole = file.stat().st_size == 8 + length + end
        return {name: entry["shape"] for name, entry in entries.items()} if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def is_unfinished(directory: Path) -> bool:
    """Whether NeMo has marked a checkpoint as one that it writes or deletes."""
    return directory.with_name(f"{directory.name}-unfinished").exists()


def _nemo(directory: Path, where: str) -> Source:
    weights, context = directory / "weights", directory / "context"
    needed = [weights / "metadata.json", weights / "common.pt", weights / ".metadata", context / "model.yaml"]
    if missing := [file.relative_to(directory) for file in needed if not file.is_file()]:
        raise InputError(f"{where}: half-written or no NeMo 2 checkpoint: {missing[0]} is missing")
    if is_unfinished(directory):
        raise InputError(f"{where}: half-written: NeMo left it marked as unfinished")
    if (weights / "modelopt_state").exists():
        raise InputError(f"{where}: holds a ModelOpt state, which is a pickle; it is not loaded")
    backend = _read_json(weights / "metadata.json", where).get("sharded_backend")
    if backend != "torch_dist":
        raise InputError(f"{where}: metadata.json: sharded_backend {backend!r}: only 'torch_dist' is read")
    contents = _check_pickle(weights / ".metadata", where)
    _check_common(weights / "common.pt", where)
    try:
        model = yaml.safe_load((context / "model.yaml").read_text())
        _check_expanded(model)
        config, family = model["config"], families.of_nemo_model(model["_target_"], where)
        if config["vocab_size"] is None:  # NeMo then pads the tokenizer's, and only the weights tell how far
            config["vocab_size"] = contents.state_dict_metadata[_EMBEDDING].size[0]
        architecture, seq_length = _architecture(config, family, where), int(config["seq_length"])
        if config.get("window_size"):  # converted as full attention, see `families.context_of`
            seq_length = min(seq_length, config["window_size"][0])
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
            f"{where}: context/model.yaml cannot be read ({type(error).__name__}: {_line(error)})"
        ) from None
    return Source(directory, "nemo", architecture, seq_length, _tokenizer_in(context, where))


def contents(source: Source) -> Any:
    """The table of contents of a NeMo 2 directory's weights: torch's `Metadata`, opened without running anything.

    Raises:
        InputError: damaged, or not safe to open.
    """
    return _check_pickle(source.path / "weights" / ".metadata", str(source.path))


def _check_expanded(value: Any, limit: int = 100_000) -> None:
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
    learned = config["position_embedding_type"] == "learned_absolute"
    return Architecture(
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["ffn_hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_query_groups") or config["num_attention_heads"],
        kv_channels=config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        gated_linear_unit=config["gated_linear_unit"],
        normalization=config["normalization"],
        share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
        add_bias_linear=config["add_bias_linear"],
        add_qkv_bias=config["add_qkv_bias"],
        position_embedding_type=config["position_embedding_type"],
        max_position_embeddings=config["seq_length"] if learned else 0,
        activation=activation,
        layernorm_epsilon=float(config["layernorm_epsilon"]),
        layernorm_zero_centered_gamma=config["layernorm_zero_centered_gamma"],
        rotary_base=float(config["rotary_base"]),
        rotary_percent=config["rotary_percent"],
        **_rope_scaling(config),
        qk_layernorm=config["qk_layernorm"],
        model_type=family,
    )


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


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {file.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: {file.name} is not a JSON object")
    return value


class _NamesOnly(pickle.Unpickler):
    """Unpickles what a distributed checkpoint's table of contents needs, and nothing else.

    The names of a package would not do: modules also hold functions, and other modules that they import.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PICKLED_BESIDE or (module == "torch" and name.isidentifier()):
            found = super().find_class(module, name)
            if f"{module}.{name}" in _PICKLED_BESIDE or type(found).__name__ == "dtype":
                return found
        elif module.startswith(_PICKLED_CLASSES_OF) and name.isidentifier():
            found = super().find_class(module, name)
            own_class = isinstance(found, type) and found.__module__ == module
            if own_class and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_pickle(file: Path, where: str) -> Any:
    try:
        with open(file, "rb") as opened:
            return _NamesOnly(opened).load()
    except Exception as error:
        raise InputError(f"{where}: {file.name} is damaged or not safe to open ({_line(error)})") from None


def _check_common(file: Path, where: str) -> None:
    """What is not sharded: plain values, which torch opens without running anything."""
    import torch

    try:
        with weights_may_only_be_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{where}: {file.name} is damaged or not safe to open ({_line(error)})") from None


def _line(error: BaseException) -> str:
    """The first sentence of what a library says; torch's advice is to switch the protection off."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__


@contextmanager
def weights_may_only_be_tensors() -> Iterator[None]:
    """Within it, torch.load opens tensors and plain values only, whatever its caller asks for: megatron-core 0.13.1
    opens `common.pt` and extra states with weights_only=False (dist_checkpointing/strategies/common.py)."""
    import pathlib

    import torch

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([pathlib.PosixPath]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
