"""What `recipes/evaluate_instruct.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.gguf import is_gguf
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.instruct import EvaluateInstructRecipe, InstructEvalConfig
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.instruct import cached_instruct_set
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError, need_package, of_setting
from nemo_minitron.evaluation import instruct
from nemo_minitron.files import user_path
from nemo_minitron.workflows.one_process import check_one_process


@dataclass(frozen=True)
class Prepared:
    """The checkpoint, the file of prompts, the prompts in tokens, and the GGUF file that must answer alike."""

    source: Source
    tokenizer: Any
    file: Path
    items: list[instruct.Item]
    gguf: Path | None = None

    def to_config(self) -> dict[str, Any]:
        """Where the prompts lie."""
        return {"file": str(self.file)}


def check(r: EvaluateInstructRecipe) -> Prepared:
    """Refuse what cannot work; generate the project's own set if no file is named.

    Raises:
        InputError: names the value, or the prompt's file and line.
    """
    e = r.instruct
    check_one_process(r.trainer, "evaluate_instruct")
    gguf = gguf_of(e)
    source = find_source(r.source, data=r.data)
    tokenizer = with_template(load_tokenizer(source.tokenizer), str(source.tokenizer))
    if len(tokenizer) > source.architecture.vocab_size:
        raise InputError(
            f"source={r.source}: its tokenizer has {len(tokenizer)} entries, the model's vocabulary "
            f"{source.architecture.vocab_size}"
        )
    file = _file(r, e)
    with of_setting("instruct.file"):
        items = instruct.load_items(
            file,
            tokenizer,
            context=source.seq_length,
            max_new_tokens=e.max_new_tokens,
            merge_system=e.merge_system,
        )
    if e.limit is not None:
        items = [items[i * len(items) // e.limit] for i in range(min(e.limit, len(items)))]
    return Prepared(source, tokenizer, file, items, gguf)


def gguf_of(e: InstructEvalConfig) -> Path | None:
    """The file of `instruct.gguf`.

    Raises:
        InputError: there is no such file, or more than one in the directory; llama.cpp's package is missing.
    """
    if e.gguf is None:
        return None
    place = user_path(e.gguf)
    found = sorted(place.glob("*.gguf")) if place.is_dir() else [place]
    if len(found) != 1 or not is_gguf(found[0]):
        raise InputError(f"instruct.gguf={e.gguf}: must be a GGUF file, or a directory with one")
    need_package("xllamacpp", f"instruct.gguf={e.gguf}")
    return found[0]


def _file(r: EvaluateInstructRecipe, e: InstructEvalConfig) -> Path:
    if e.file is not None:
        return Path(e.file)
    return Path(getattr(cached_instruct_set(cache_dir(r.data, "instruct"), e.seed, e.sizes), e.split))
