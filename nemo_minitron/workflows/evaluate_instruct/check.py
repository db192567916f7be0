"""What `recipes/evaluate_instruct.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.instruct import EvaluateInstructRecipe, InstructEvalConfig
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.instruct import cached_instruct_set
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation import instruct


@dataclass(frozen=True)
class Prepared:
    """The checkpoint, the file of prompts, and the prompts in tokens."""

    source: Source
    tokenizer: Any
    file: Path
    items: list[instruct.Item]

    def to_config(self) -> dict[str, Any]:
        """Where the prompts lie."""
        return {"file": str(self.file)}


def check(r: EvaluateInstructRecipe) -> Prepared:
    """Refuse what cannot work; generate the project's own set if no file is named.

    Raises:
        InputError: names the value, or the prompt's file and line.
    """
    e = r.instruct
    if r.trainer.ranks > 1:
        raise InputError(f"{r.trainer.ranks} ranks: evaluate_instruct works in one process")
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
    return Prepared(source, tokenizer, file, items)


def _file(r: EvaluateInstructRecipe, e: InstructEvalConfig) -> Path:
    if e.file is not None:
        return Path(e.file)
    return Path(getattr(cached_instruct_set(cache_dir(r.data, "instruct"), e.seed, e.sizes), e.split))
