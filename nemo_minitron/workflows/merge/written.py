"""A merged model on the disk: a Hugging Face directory, NeMo 2, or distinct layers with the path beside them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.source import PATH_FILE, find_source
from nemo_minitron.config.merge import MergeRecipe
from nemo_minitron.export import huggingface
from nemo_minitron.export.target import under_another_name
from nemo_minitron.files import remove
from nemo_minitron.merging.models import Checked, Tensors
from nemo_minitron.merging.path import Laid, distinct, folds, text_of
from nemo_minitron.merging.settings import Merge
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.merge import papers
from nemo_minitron.workflows.merge.check import Prepared
from nemo_minitron.workflows.preflight import converted

NEMO = "nemo"


def write(
    r: MergeRecipe,
    prepared: Prepared,
    merge: Merge,
    tensors: Tensors,
    directory: Path,
    recipe: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Write the model to where the recipe says, with its card.

    Args:
        merge: that made it.
        tensors: of the result.
        directory: of the run.
        recipe: what the card shows; None: the merge.
        note: as `papers.write`.

    Returns:
        Fields of `result.json`.

    Raises:
        FailedRun: a tensor is not finite.
    """
    whole = not isinstance(tensors, Laid) or folds(tensors.path)
    with under_another_name(prepared.target) as temporary:
        temporary.mkdir()
        stored, places = (tensors, None) if whole else distinct(tensors)  # type: ignore[arg-type]
        files = _write_directory(prepared, stored, temporary)
        weight_bytes = sum(file.stat().st_size for file in files)
        if places is not None:
            text = json.dumps({"path": text_of(places)}, indent=2) + "\n"
            (temporary / PATH_FILE).write_text(text, encoding="utf-8")
        elif r.format == NEMO:
            _to_nemo(r, temporary, directory)
        shown = papers.recipe_text(merge) if recipe is None else recipe
        papers.write(prepared, merge, shown, tensors.architecture, temporary, note)
    return {
        "format": r.format if whole else PATH_FILE,
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
