"""Pruning with `stream=true`: from a Hugging Face directory into another, a block of rows at a time."""

import hashlib
import json
import os
import time
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
from nemo_minitron.pruning.streamed import PrunedWeights
from nemo_minitron.workflows.prune import artifacts
from nemo_minitron.workflows.prune.streamed_check import StreamedPrepared


def run(r: PruneRecipe, prepared: StreamedPrepared, directory: Path) -> dict[str, Any]:
    """Write the student under another name, check it, and give it its own.

    A run that was killed goes on at the file of weights that it was in.

    Returns:
        The fields of `result.json`.
    """
    plan, scores = prepared.plan, prepared.scores
    for path in artifacts.stale(directory):
        remove(path)
    unfinished, mark = _begun(directory, prepared)
    plan.save(directory / "plan.json")
    artifacts.keep_scores([(scores, plan)], directory)
    begin = time.monotonic()
    kept, files = _write(prepared, unfinished)
    written_s = time.monotonic() - begin
    _verify(unfinished, prepared)
    put(unfinished, directory / CHECKPOINT)
    mark.unlink()
    samples = 0 if scores is None else scores.samples
    return {
        **artifacts.facts(r, plan.source, prepared.source_sha256, plan.target, samples, directory),
        "stream": True,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "weight_files": len(files),
        "weight_files_kept": kept,
        "weight_bytes": sum((directory / CHECKPOINT / file).stat().st_size for file in files),
        "write_s": round(written_s, 2),
    }


def _begun(directory: Path, prepared: StreamedPrepared) -> tuple[Path, Path]:
    """Where the student is written: an empty directory, or what a run of the same plan has left there.

    Returns:
        The directory, and the file that says what it will hold.
    """
    final, unfinished = directory / CHECKPOINT, directory / f".{CHECKPOINT}.tmp"
    mark = directory / artifacts.MARK
    if not mark.is_file() or read_text(mark) != _state(prepared):
        remove(unfinished)
        remove(final)
    elif final.is_dir():  # killed between its name and its result
        remove(unfinished)
        os.replace(final, unfinished)
    write_text(mark, _state(prepared))
    unfinished.mkdir(exist_ok=True)
    return unfinished, mark


def _state(prepared: StreamedPrepared) -> str:
    """All that decides the bytes of the files."""
    plan = json.dumps(prepared.plan.to_dict(), sort_keys=True)
    state = {
        "plan": hashlib.sha256(plan.encode()).hexdigest(),
        "dtype": str(prepared.dtype),
        "shard_bytes": prepared.shard_bytes,
    }
    return json.dumps(state) + "\n"


def _write(prepared: StreamedPrepared, place: Path) -> tuple[int, list[str]]:
    """The weights, config and tokenizer.

    Returns:
        How many files of weights were there already, and the names of all.
    """
    source, plan = prepared.source, prepared.plan
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


def _verify(place: Path, prepared: StreamedPrepared) -> None:
    """Read the headers of what was written: every tensor of the target is there once, in its shape, and no other.

    Raises:
        FailedRun: it is not so.
    """
    try:
        found = find_source(place, "checkpoint")
    except InputError as error:
        raise FailedRun(f"what was written cannot be read: {error}") from None
    dtype = str(prepared.dtype).removeprefix("torch.")
    if (found.architecture, found.dtype) != (prepared.plan.target, dtype):
        raise FailedRun("what was written says another architecture or dtype than the plan")
