"""A GGUF file as a Hugging Face directory in the cache."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.gguf import config, reader, tokenizer, weights
from nemo_minitron.checkpoints.gguf.settings import Settings
from nemo_minitron.checkpoints.untrusted import check_no_pointer
from nemo_minitron.errors import InputError, need_package
from nemo_minitron.files import file_sha256, making_once

# How a converted file is laid out; part of the cache's key.
_FORMAT = 2


def is_gguf(path: Path) -> bool:
    """Whether a path is a regular file that calls itself GGUF, or begins as such files do."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError:
        return False


ArchitectureOf = Callable[[Mapping[str, Any], str], Architecture]


def to_huggingface(path: Path, cache: Path, where: str, architecture_of: ArchitectureOf) -> Path:
    """Convert a GGUF file once; a cached, single-process step.

    Args:
        cache: the directory of all converted files.
        where: how messages name the file, such as "source=model.gguf".
        architecture_of: reads, or refuses, what a config.json says of a family.

    Returns:
        The directory: config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Raises:
        InputError: damaged, not one of the families, or something in it that is not converted.
    """
    need_package("gguf", f"{where}, a GGUF file")
    final = cache / _key(path, where)
    if (final / "config.json").is_file():
        return final
    try:
        with making_once(final) as temporary:
            _convert(path, temporary, where, architecture_of)
    except OSError as error:
        raise InputError(f"{where}: cannot be converted into {cache} ({error.strerror or error})") from None
    return final


def _key(path: Path, where: str) -> str:
    try:
        check_no_pointer(path, where)
        return hashlib.sha256(f"{_FORMAT}\n{file_sha256(path)}".encode()).hexdigest()[:24]
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None


def _convert(path: Path, to: Path, where: str, architecture_of: ArchitectureOf) -> None:
    file = reader.read_header(path, where)
    values = config.config_json(file, where)
    architecture, settings = architecture_of(values, where), Settings(file.metadata, where)
    table = weights.table(file, architecture, where)
    vocabulary = tokenizer.read_vocabulary(settings, architecture.vocab_size)
    ids = _ids(vocabulary)
    dtype = weights.dtype_of(file)
    to.mkdir(parents=True)
    tokenizer.write_tokenizer(settings, vocabulary, values["max_position_embeddings"], to)
    print(f"{where}: converting it to a Hugging Face directory of {dtype}, once", file=sys.stderr, flush=True)
    weights.write_safetensors(file, table, dtype, to / "model.safetensors", where)
    _write(to / "generation_config.json", ids)
    _write(to / "config.json", {**values, **ids, "torch_dtype": dtype})


def _ids(vocabulary: Any) -> dict[str, Any]:
    """Special tokens' ids as config.json has them: a list where several end an answer."""
    ids: dict[str, Any] = {
        f"{role}_token_id": vocabulary.special[role] for role in ("bos", "pad") if role in vocabulary.special
    }
    if vocabulary.stops:
        ids["eos_token_id"] = vocabulary.stops if len(vocabulary.stops) > 1 else vocabulary.stops[0]
    return {"bos_token_id": None, "eos_token_id": None, **ids}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2))
