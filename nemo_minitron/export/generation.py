"""Which tokens end a text, and how its author samples: carried from the source to what is exported.

A Hugging Face directory says it in generation_config.json and, for token ids only, in config.json. Both are gathered
into one generation_config.json beside the tokenizer's files, which NeMo copies into the context of every checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.untrusted import read_json
from nemo_minitron.errors import InputError

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of the library that wrote the file, not of the model.
_OF_THE_WRITER = ("transformers_version", "_from_model_config")


def gathered(directory: Path) -> dict[str, Any]:
    """The settings of a Hugging Face directory: its generation_config.json, and ids that only config.json has.

    Values that are neither plain nor lists of integers are left out: they would name code or hold whole configurations.

    Raises:
        InputError: a file that is no JSON object, or an invalid id.
    """
    settings = {name: value for name, value in carried(directory).items() if _is_plain(value)}
    config = _read(directory / "config.json")
    for name in IDS:
        if settings.get(name) is None and config.get(name) is not None:
            settings[name] = config[name]
    for name in IDS:
        ids_of(settings, name, directory)
    return settings


def carried(directory: Path) -> dict[str, Any]:
    """The settings that lie beside a tokenizer; none in checkpoints of older versions.

    Raises:
        InputError: no JSON object.
    """
    return {name: value for name, value in _read(directory / FILE).items() if name not in _OF_THE_WRITER}


def write(settings: Mapping[str, Any], directory: Path) -> None:
    """Write `gathered` settings where `carried` finds them."""
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, str(file.parent)) if file.exists() else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def ids_of(settings: Mapping[str, Any], name: str, where: Any) -> list[int]:
    """One of `IDS` as a list, empty where it is not set.

    Raises:
        InputError: something else than ids.
    """
    value = settings.get(name)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
        raise InputError(f"{where}: {name}={str(value)[:100]}: must be a token id, or a list of them")
    return found


def for_export(
    settings: Mapping[str, Any], tokenizer: Any, end_of_answer: int | None, vocab_size: int
) -> dict[str, Any]:
    """Settings with the ids that a student needs.

    Args:
        settings: those of the source, see `carried`.
        tokenizer: Hugging Face's; its ids stand in where the source has none.
        end_of_answer: the token that the chat template ends an answer with; it is a stop token.
        vocab_size: rows of the model's embeddings.

    Raises:
        InputError: an id without a row.
    """
    result = dict(settings)
    for name in IDS:
        found = ids_of(settings, name, FILE) or ids_of({name: getattr(tokenizer, name)}, name, "tokenizer")
        if name == "eos_token_id" and end_of_answer is not None and end_of_answer not in found:
            found = [*found, end_of_answer]
        if beyond := [i for i in found if i >= vocab_size]:
            raise InputError(f"{FILE}: {name}={beyond[0]}: the model's vocabulary has {vocab_size} rows")
        result[name] = found[0] if len(found) == 1 else found or None
    return {name: value for name, value in result.items() if value is not None}
