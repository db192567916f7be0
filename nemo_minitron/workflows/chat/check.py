"""What can be refused before a model is asked anything."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.families import FAMILIES
from nemo_minitron.checkpoints.gguf import is_gguf
from nemo_minitron.checkpoints.gguf.reader import read_header
from nemo_minitron.checkpoints.gguf.settings import Settings
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.chat import ChatRecipe
from nemo_minitron.data.chat.encoding import render_prompt
from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError, need_package
from nemo_minitron.export import huggingface
from nemo_minitron.files import read_text, user_path
from nemo_minitron.workflows.one_process import OneProcess, check_one_process

TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Prepared(OneProcess):
    """What answers: a `file` for llama.cpp, or a `source` for transformers; `context`: in tokens; `has_template`:
    whether it was made for conversations, else a prompt is gone on with as it is."""

    context: int
    has_template: bool
    file: Path | None = None
    source: Any = None


def check(r: ChatRecipe) -> Prepared:
    """Refuse what cannot answer.

    Raises:
        InputError: names the value.
    """
    check_one_process(r.trainer, "chat")
    if r.prompt is not None and not r.prompt.strip():
        raise InputError("prompt: is empty; leave it out to type messages")
    path = exported(user_path(r.source))
    if (file := gguf_at(path)) is not None:
        return _of_file(r, file)
    return _of_source(r, path)


def exported(path: Path) -> Path:
    """What a run of recipes/export.py wrote, or the path itself."""
    try:
        result = json.loads(read_text(path / RESULT))
    except (OSError, ValueError):
        return path
    if (
        isinstance(result, dict)
        and result.get("recipe") == "export"
        and isinstance(result.get("exported"), str)
    ):
        return Path(result["exported"])
    return path


def gguf_at(path: Path, key: str = "source") -> Path | None:
    """The GGUF file at a path, or the only one in a directory that holds no other checkpoint.

    Args:
        key: what the configuration calls it.

    Raises:
        InputError: a directory of several.
    """
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise InputError(f"{key}={path}: holds {len(found)} GGUF files ({names}); name one of them")
        return found[0] if found else None
    return path if is_gguf(path) else None


def _of_file(r: ChatRecipe, file: Path) -> Prepared:
    for package in ("gguf", "xllamacpp"):
        need_package(package, f"source={r.source}, a GGUF file")

    where = f"source={r.source}"
    settings = Settings(read_header(file, where).metadata, where)
    made_for = settings.integer(".context_length")
    has_template = bool(settings.text(TEMPLATE, ""))
    _check_system(r, has_template)
    return Prepared(min(made_for, r.chat.context), has_template, file=file)


def _of_source(r: ChatRecipe, path: Path) -> Prepared:
    # A template is tried in a child process; `tokenizers` would warn of its threads there.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    source = find_source(path)
    arch = source.architecture
    if arch.model_type is None:
        raise InputError(f"source={r.source}: a plain GPTModel; transformers has {', '.join(FAMILIES)}")
    tokenizer = huggingface.load_tokenizer(source.tokenizer, arch.vocab_size)
    huggingface.generation_settings(source.tokenizer, arch.vocab_size)
    has_template = bool(tokenizer.chat_template)
    _check_system(r, has_template)
    if r.prompt is not None:
        length = len(prompt_ids(tokenizer, first(r), has_template))
        if length >= source.seq_length:
            raise InputError(f"prompt: has {length} tokens; the model was made for {source.seq_length}")
    return Prepared(source.seq_length, has_template, source=source)


def _check_system(r: ChatRecipe, has_template: bool) -> None:
    if r.chat.system is not None and not has_template:
        raise InputError(
            f"chat.system: the model has no chat template, and so no system message; source={r.source}"
        )


def first(r: ChatRecipe) -> list[dict[str, str]]:
    """A conversation's first messages."""
    system = [] if r.chat.system is None else [{"role": "system", "content": r.chat.system}]
    return system if r.prompt is None else [*system, {"role": "user", "content": r.prompt}]


def prompt_ids(tokenizer: Any, messages: list[Any], has_template: bool) -> list[int]:
    """A prompt's tokens: by the template, or of the last message as it is.

    Raises:
        InputError: the template refuses the messages, or one holds a control token.
    """
    if has_template:
        return render_prompt(tokenizer, messages, "prompt")
    return list(tokenizer.encode(messages[-1]["content"]))
