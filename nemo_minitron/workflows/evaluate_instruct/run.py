"""The work of `recipes/evaluate_instruct.py`: greedy answers of a checkpoint, scored by category."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.instruct import EvaluateInstructRecipe, InstructEvalConfig
from nemo_minitron.config.recipes import cache_dir
from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.data.chat.template import with_template
from nemo_minitron.data.instruct import cached_instruct_set
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation import instruct
from nemo_minitron.run import main as recipe

ANSWERS = "answers.jsonl"


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
            file, tokenizer, context=source.seq_length, max_new_tokens=e.max_new_tokens
        )
    return Prepared(source, tokenizer, file, items)


def _file(r: EvaluateInstructRecipe, e: InstructEvalConfig) -> Path:
    if e.file is not None:
        return Path(e.file)
    return Path(getattr(cached_instruct_set(cache_dir(r.data, "instruct"), e.seed, e.sizes), e.split))


def run(r: EvaluateInstructRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Ask, score, and write down each answer in RUN/answers.jsonl.

    Returns:
        The fields of `result.json`; the scores are those of `evaluation.instruct.scores`.
    """
    recipe.fresh(directory / ANSWERS)
    model = load_model(prepared.source, directory)
    said = instruct.answers(
        model,
        prepared.tokenizer,
        prepared.items,
        max_new_tokens=r.instruct.max_new_tokens,
        batch_size=r.instruct.batch_size,
        progress=_progress(len(prepared.items)),
    )
    path = write_jsonl(directory / ANSWERS, instruct.rows(prepared.items, said))
    return {
        "recipe": "evaluate_instruct",
        "source": str(r.source),
        "source_sha256": prepared.source.sha256(),
        "params": prepared.source.architecture.parameters(),
        "file": str(prepared.file),
        "file_sha256": hashlib.sha256(prepared.file.read_bytes()).hexdigest(),
        "max_new_tokens": r.instruct.max_new_tokens,
        "chat_template_sha256": hashlib.sha256(prepared.tokenizer.chat_template.encode()).hexdigest(),
        **instruct.scores(prepared.items, said),
        "answers": str(path.resolve()),
        "peak_rss_gib": recipe.peak_rss_gib(),
    }


def load_model(source: Source, scratch: Path) -> Any:
    """A checkpoint as transformers' model, in float32 on the CPU, in its own precision where there is CUDA.

    Args:
        scratch: a directory in which a NeMo 2 checkpoint is exported, for as long as it takes to load.

    Raises:
        InputError: the weights do not fit the config, or NeMo has no exporter for the model.
    """
    import torch

    from nemo_minitron.nemo.huggingface import export_checkpoint, load_huggingface

    if source.kind == "huggingface":
        model = load_huggingface(source)
    else:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".huggingface-") as exported:
            model = load_huggingface(find_source(export_checkpoint(source, Path(exported))))
    return model.cuda() if torch.cuda.is_available() else model.float()


def _progress(total: int) -> Callable[[int], None]:
    return lambda done: print(f"answers: {done} of {total}", flush=True)
