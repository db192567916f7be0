"""Conversations in recipes: the tokenizer with its chat template, the files, and what becomes of both before a run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source
from nemo_minitron.config.recipes import DataConfig, cache_dir
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.held_out import refuse_shared
from nemo_minitron.data.instruct import cached_instruct_set
from nemo_minitron.data.tokenizer import load_tokenizer, tokenizer_sha256
from nemo_minitron.errors import InputError
from nemo_minitron.export import generation
from nemo_minitron.files import making_once, read_text, user_path


def prepared_tokenizer(chat_template: str | None, student: Source, d: DataConfig, key: str) -> Path:
    """A directory with the student's tokenizer and the chat template of the run.

    Args:
        chat_template: a Jinja file; None: the tokenizer's own, or `CHAT_TEMPLATE`.
        key: the setting that names it.

    Raises:
        InputError: a template that cannot be read or encoded, a tokenizer with more entries than the model has rows, or
            with others than the student's.
    """
    tokenizer = _fitting_tokenizer(student, d)
    if chat_template:
        try:
            tokenizer.chat_template = read_text(chat_template, 1 << 20)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{key}={chat_template}: cannot be read ({error})") from None
    with_template(tokenizer, f"{key}={chat_template or 'null'}")
    settings = generation.gathered(student.tokenizer)
    named = (
        f"{tokenizer_sha256(tokenizer)}\n{tokenizer.chat_template}\n{json.dumps(settings, sort_keys=True)}"
    )
    digest = hashlib.sha256(named.encode()).hexdigest()[:24]
    final = cache_dir(d, "tokenizers") / f"chat-{digest}"
    if not (final / "tokenizer").is_dir():
        with making_once(final) as temporary:
            # NeMo calls the directory in a checkpoint's context as it is called here.
            tokenizer.save_pretrained(str(temporary / "tokenizer"))
            generation.write(settings, temporary / "tokenizer")
    return final / "tokenizer"


def _fitting_tokenizer(student: Source, d: DataConfig) -> Any:
    tokenizer = own = load_tokenizer(str(student.tokenizer))
    if d.tokenizer:
        tokenizer = load_tokenizer(d.tokenizer)
    if len(tokenizer) > student.architecture.vocab_size:
        raise InputError(
            f"student: its vocabulary has {student.architecture.vocab_size} rows, the tokenizer has {len(tokenizer)} "
            "entries"
        )
    if differing := set(tokenizer.get_vocab().items()) ^ set(own.get_vocab().items()):
        token, number = min(differing, key=lambda entry: entry[1])
        raise InputError(
            f"data.tokenizer={d.tokenizer}: another vocabulary than the student's; they differ at "
            f"id {number}, {token!r}"
        )
    return tokenizer


def files_of(
    given: Mapping[str, Any], own_set: tuple[str, str], d: DataConfig, group: str
) -> dict[str, list[str]]:
    """The files of both splits.

    Args:
        given: "train" and "valid", as the configuration has them.
        own_set: the files of `data.instruct.InstructFiles` that stand for them where neither is given.
        group: of the settings, such as "align".

    Raises:
        InputError: one of them alone, or a file in both.
    """
    if all(value is None for value in given.values()):
        own = cached_instruct_set(cache_dir(d, "instruct"), d.seed)
        given = {name: str(getattr(own, file)) for name, file in zip(given, own_set, strict=True)}
    for name, value in given.items():
        if value is None:
            raise InputError(
                f"{group}.{name}=null: give a JSONL file, as for the other split, or leave out both"
            )
    files = {
        name: [str(user_path(file)) for file in ([value] if isinstance(value, str) else value)]
        for name, value in given.items()
    }
    refuse_shared(files["train"], files["valid"], f"{group}.train", f"{group}.valid")
    return files
