"""A Hugging Face directory out of a NeMo 2 checkpoint, without the whole of it in memory.

Plain transformers 4 and 5 load what is written: its own class of the family, no remote code, every weight and no other.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.arch import Architecture
from nemo_minitron.data import tokenizer as tokenizers
from nemo_minitron.data.chat.encoding import stop_token
from nemo_minitron.data.chat.template import check_template
from nemo_minitron.errors import InputError
from nemo_minitron.export import generation
from nemo_minitron.export.safetensors_writer import write_shards
from nemo_minitron.export.tensors import EMBEDDING, Part, Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SOURCE_DTYPE = "source"
SHARD_BYTES = 5 * 10**9  # transformers' default


@dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
        weights: of the checkpoint.
        config: what its config.json has to say of the architecture (`families.config_of`).
        tokenizer: a Hugging Face directory.
        dtype: that the weights are written in.
    """

    weights: Weights
    config: Mapping[str, Any]
    tokenizer: Path
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the weights as they will be written."""
        return self.weights.architecture.parameters() * self.dtype.itemsize


def dtype_of(name: str, weights: Weights) -> torch.dtype:
    """The dtype that `export.dtype` names; "source" is that of the checkpoint's embeddings.

    Raises:
        InputError: a checkpoint of another dtype.
    """
    if name != SOURCE_DTYPE:
        return DTYPES[name]
    stored = weights.reader.dtype(EMBEDDING)
    if stored not in DTYPES.values():
        raise InputError(
            f"export.dtype=source: the checkpoint holds {stored}; choose one of {', '.join(DTYPES)}"
        )
    return stored


def load_tokenizer(directory: Path, vocab_size: int) -> Any:
    """The tokenizer that is written beside the weights.

    Raises:
        InputError: it cannot be loaded, has more entries than the model has rows, or has a chat template that does not
            render or does not end answers.
    """
    found = tokenizers.load_tokenizer(directory)
    if len(found) > vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {len(found)} entries, the model's vocabulary {vocab_size} rows"
        )
    if found.chat_template:
        check_template(found, str(directory))
    return found


def generation_settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """What generation_config.json will say.

    Args:
        directory: of the tokenizer, with the settings that were carried along; or a Hugging Face model's.
        vocab_size: rows of the model's embeddings.

    Raises:
        InputError: as `load_tokenizer`; a broken file, or an id that the model has no row for.
    """
    tokenizer = load_tokenizer(directory, vocab_size)
    end = stop_token(tokenizer, str(directory)) if tokenizer.chat_template else None
    return generation.for_export(generation.gathered(directory), tokenizer, end, vocab_size)


def write(
    model: Model, output: Path, max_shard_bytes: int, progress: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write the directory of a checkpoint's model; as `write_directory`."""
    return write_directory(
        model.weights, model.config, model.tokenizer, model.dtype, output, max_shard_bytes, progress
    )


class Readable(Protocol):
    """A model's weights as Hugging Face tensors, read a block of rows at a time."""

    @property
    def architecture(self) -> Architecture:
        """Of the model."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """Its tensors by name, in the order in which they are written."""

    def blocks(self, name: str) -> Iterable[Tensor]:
        """A tensor's blocks of rows, one after the other."""


def write_directory(
    weights: Readable,
    config: Mapping[str, Any],
    tokenizer: Path,
    dtype: torch.dtype,
    output: Path,
    max_shard_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write a Hugging Face directory.

    Args:
        config, tokenizer, dtype: as of `Model`.
        output: a directory: empty, or with files of weights that are whole, which are kept.
        progress: told the bytes of weights written so far.

    Returns:
        The files of weights.
    """
    arch = weights.architecture
    settings = generation_settings(tokenizer, arch.vocab_size)
    _write_config(arch.model_type, config, dtype, settings, output)
    _write_tokenizer(load_tokenizer(tokenizer, arch.vocab_size), output)
    _write_json(output / generation.FILE, settings)
    shapes = {name: part.shape for name, part in weights.parts.items()}
    return write_shards(output, shapes, dtype, max_shard_bytes, weights.blocks, progress)


def _write_config(
    model_type: str | None,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    output: Path,
) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = AutoConfig.for_model(
        model_type,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        torch_dtype=str(dtype).removeprefix("torch."),
        # Families have ids of their own that they take where none is given.
        **{name: settings.get(name) for name in generation.IDS},
        **config,
    )
    # What differs from the family's defaults, and all that a reader with other defaults must know.
    _write_json(output / "config.json", json.loads(made.to_json_string()) | dict(config))


def _write_tokenizer(tokenizer: Any, output: Path) -> None:
    tokenizer.save_pretrained(str(output))
    file = output / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("auto_map", None)  # code of its own, which was not loaded
    _write_json(file, values)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
