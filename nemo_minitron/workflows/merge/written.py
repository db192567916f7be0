"""A merged model on the disk: as a Hugging Face directory or as NeMo 2."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.merge import MergeRecipe
from nemo_minitron.export import huggingface
from nemo_minitron.export.target import under_another_name
from nemo_minitron.files import remove
from nemo_minitron.merging.models import Checked, Tensors
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.merge import papers
from nemo_minitron.workflows.merge.check import Prepared
from nemo_minitron.workflows.preflight import converted

NEMO = "nemo"


def write(r: MergeRecipe, prepared: Prepared, tensors: Tensors, directory: Path) -> dict[str, Any]:
    """Write the model to where the recipe says, with its card.

    Args:
        tensors: of the result.
        directory: of the run.

    Returns:
        Fields of `result.json`.

    Raises:
        FailedRun: a tensor is not finite.
    """
    with under_another_name(prepared.target) as temporary:
        temporary.mkdir()
        files = _write_directory(prepared, tensors, temporary)
        weight_bytes = sum(file.stat().st_size for file in files)
        if r.format == NEMO:
            _to_nemo(r, temporary, directory)
        papers.write(prepared, tensors.architecture, temporary)
    return {
        "format": r.format,
        "params": tensors.architecture.parameters(),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "license": None if prepared.licence is None else prepared.licence.name,
        "weight_bytes": weight_bytes,
        "checkpoint": str(prepared.target),
    }


def _write_directory(prepared: Prepared, tensors: Tensors, place: Path) -> list[Path]:
    arch, dtype = tensors.architecture, prepared.dtype
    show = progress_bar("written", arch.parameters() * dtype.itemsize, unit="B")
    return huggingface.write_directory(
        Checked(tensors, dtype),
        config_of(arch, prepared.seq_length),
        prepared.tokenizer,
        dtype,
        place,
        prepared.shard_bytes,
        show,
    )


def _to_nemo(r: MergeRecipe, place: Path, directory: Path) -> None:
    """Put the NeMo 2 form of a Hugging Face directory into its place."""
    cache = directory / ".converted"
    remove(cache)
    try:
        made = converted(find_source(place), dataclasses.replace(r.data, cache_dir=str(cache)))
        shutil.rmtree(place)
        os.replace(made.path, place)
    finally:
        remove(cache)
