"""The work of `recipes/evaluate_instruct.py`: greedy answers of a checkpoint, scored by category."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.instruct import EvaluateInstructRecipe
from nemo_minitron.data.chat.conversations import write_jsonl
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.evaluation import instruct
from nemo_minitron.files import remove_stale
from nemo_minitron.nemo.huggingface import export_checkpoint, load_huggingface
from nemo_minitron.workflows.evaluate_instruct.check import Prepared
from nemo_minitron.workflows.evaluate_instruct.on_device import compared

ANSWERS = "answers.jsonl"


def run(r: EvaluateInstructRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Ask, score, and write down each answer in RUN/answers.jsonl.

    Returns:
        The fields of `result.json`; the scores are those of `evaluation.instruct.scores`.
    """
    remove_stale(directory / ANSWERS)
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
    most, texts = r.instruct.max_new_tokens, [answer.text for answer in said]
    beside = compared(prepared.gguf, prepared.items, texts, most, directory) if prepared.gguf else {}
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
        **beside,
        "answers": str(path.resolve()),
        "peak_rss_gib": peak_rss_gib(),
    }


def load_model(source: Source, scratch: Path) -> Any:
    """A checkpoint as transformers' model, in float32 on the CPU, in its own precision where there is CUDA.

    Args:
        scratch: a directory in which a NeMo 2 checkpoint is exported, for as long as it takes to load.

    Raises:
        InputError: the weights do not fit the config, or NeMo has no exporter for the model.
    """
    if source.kind == "huggingface":
        model = load_huggingface(source)
    else:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".huggingface-") as exported:
            model = load_huggingface(find_source(export_checkpoint(source, Path(exported))))
    return model.cuda() if torch.cuda.is_available() else model.float()


def _progress(total: int) -> Callable[[int], None]:
    return lambda done: print(f"answers: {done} of {total}", flush=True)
