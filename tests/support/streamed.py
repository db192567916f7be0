"""A plan carried out from file to file, to compare with what a model in memory makes of it."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.export.huggingface import SHARD_BYTES, write_directory
from nemo_minitron.pruning.streamed import PrunedWeights


def streamed(source: Path, plan: Any, output: Path) -> dict[str, bytes]:
    """The files of the student, by name.

    Args:
        source: a Hugging Face directory.
        output: where they are written; made.
    """
    found = find_source(source)
    output.mkdir()
    write_directory(
        PrunedWeights(plan, TensorFiles(source, found.architecture, "source").read),
        config_of(plan.target, found.seq_length),
        found.tokenizer,
        getattr(torch, found.dtype),
        output,
        SHARD_BYTES,
    )
    return contents(output)


def contents(directory: Path) -> dict[str, bytes]:
    """Its files' bytes by name."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
