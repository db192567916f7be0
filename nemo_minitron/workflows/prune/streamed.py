"""Pruning with `stream=true`: from a Hugging Face directory into another, a block of rows at a time."""

import hashlib
import importlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.source import CHECKPOINT, find_source
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.errors import FailedRun, InputError
from nemo_minitron.export.huggingface import write_directory
from nemo_minitron.files import put, read_text, remove, write_text
from nemo_minitron.progress import progress_bar
from nemo_minitron.pruning import PrunePlan
from nemo_minitron.pruning.streamed import PrunedWeights
from nemo_minitron.workflows.preflight import STATES
from nemo_minitron.workflows.prune import artifacts, plans
from nemo_minitron.workflows.prune.streamed_check import StreamedPrepared


def run(r: PruneRecipe, prepared: StreamedPrepared, directory: Path) -> dict[str, Any]:
    """Score if need be, write the student under another name, check it, and give it its own.

    A run that was killed goes on at the layer that it scored, or at the file of weights that it was in.

    Returns:
        The fields of `result.json`.
    """
    plan, scores, measured = _planned(r, prepared, directory)
    for path in artifacts.stale(directory):
        remove(path)
    unfinished, mark = _begun(directory, prepared, plan)
    artifacts.keep_scores([(scores, plan)], directory)
    begin = time.monotonic()
    kept, files = _write(prepared, plan, unfinished)
    written_s = time.monotonic() - begin
    _verify(unfinished, prepared, plan)
    replace(plan, source_sha256=prepared.source_sha256).save(directory / "plan.json")
    put(unfinished, directory / CHECKPOINT)
    if prepared.plan is None:
        measured |= _scoring().after(r, prepared, mark.read_text(), directory)
    mark.unlink()
    remove(directory / STATES)
    samples = 0 if scores is None else scores.samples
    return {
        **artifacts.facts(r, plan.source, prepared.source_sha256, plan.target, samples, directory),
        **measured,
        "stream": True,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "weight_files": len(files),
        "weight_files_kept": kept,
        "weight_bytes": sum((directory / CHECKPOINT / file).stat().st_size for file in files),
        "write_s": round(written_s, 2),
    }


def _planned(
    r: PruneRecipe, prepared: StreamedPrepared, directory: Path
) -> tuple[PrunePlan, Any, dict[str, Any]]:
    """The plan, the scores that it was made from, and what scoring them measured."""
    if prepared.plan is not None:
        return prepared.plan, prepared.scores, {}
    scores, measured = _scoring().before(r, prepared, directory)
    plan = plans.scored_plan(
        r.prune,
        prepared.source.architecture,
        prepared.target,
        scores,
        prepared.source_sha256,
        prepared.keep_layers,
    )
    return plan, scores, measured


def _scoring() -> Any:
    """The passes through a model: NeMo's imports take most of the memory that a plain streamed pruning may have."""
    return importlib.import_module(f"{__package__}.streamed_scoring")


def _begun(directory: Path, prepared: StreamedPrepared, plan: PrunePlan) -> tuple[Path, Path]:
    """Where the student is written: an empty directory, or what a run of the same plan has left there.

    Returns:
        The directory, and the file that says what it will hold.
    """
    final, unfinished = directory / CHECKPOINT, directory / f".{CHECKPOINT}.tmp"
    mark, state = directory / artifacts.MARK, _state(prepared, plan)
    if not mark.is_file() or read_text(mark) != state:
        remove(unfinished)
        remove(final)
    elif final.is_dir():  # killed between its name and its result
        remove(unfinished)
        os.replace(final, unfinished)
    write_text(mark, state)
    unfinished.mkdir(exist_ok=True)
    return unfinished, mark


def _state(prepared: StreamedPrepared, plan: PrunePlan) -> str:
    """All that decides the bytes of the files; the source by its files' sizes and times, since its hash may still be at
    work."""
    text = json.dumps(plan.to_dict() | {"source_sha256": None}, sort_keys=True)
    stats = {file.name: file.stat() for file in prepared.source.files}
    state = {
        "plan": hashlib.sha256(text.encode()).hexdigest(),
        "source": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
        "dtype": str(prepared.dtype),
        "shard_bytes": prepared.shard_bytes,
    }
    return json.dumps(state) + "\n"


def _write(prepared: StreamedPrepared, plan: PrunePlan, place: Path) -> tuple[int, list[str]]:
    """The weights, config and tokenizer.

    Returns:
        How many files of weights were there already, and the names of all.
    """
    source = prepared.source
    tensors = TensorFiles(source.path, source.architecture, f"source={source.path}")
    kept = len(list(place.glob("*.safetensors")))
    files = write_directory(
        PrunedWeights(plan, tensors.read),
        config_of(plan.target, source.seq_length),
        source.tokenizer,
        prepared.dtype,
        place,
        prepared.shard_bytes,
        progress_bar("pruned", plan.target.parameters() * prepared.dtype.itemsize, unit="B"),
    )
    return kept, [file.name for file in files]


def _verify(place: Path, prepared: StreamedPrepared, plan: PrunePlan) -> None:
    """Read the headers of what was written: every tensor of the target is there once, in its shape, and no other.

    Raises:
        FailedRun: it is not so.
    """
    try:
        found = find_source(place, "checkpoint")
    except InputError as error:
        raise FailedRun(f"what was written cannot be read: {error}") from None
    dtype = str(prepared.dtype).removeprefix("torch.")
    if (found.architecture, found.dtype) != (plan.target, dtype):
        raise FailedRun("what was written says another architecture or dtype than the plan")
