"""What a pruning with `stream=true` refuses and prepares: the plan is made here, before anything is written."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.gguf import is_gguf
from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.checkpoints.tensor_files import check_tied
from nemo_minitron.checkpoints.weight_files import read_headers
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.export.target import bytes_of
from nemo_minitron.pruning import PrunePlan, compose
from nemo_minitron.workflows.preflight import check_room
from nemo_minitron.workflows.prune import artifacts, plans

_BESIDE_WEIGHTS = 64 << 20  # bytes; tokenizer, plan, scores


@dataclass(frozen=True)
class StreamedPrepared:
    """What is known before a streamed pruning writes. `source`: of kind "huggingface"; `scores`: those given, or None;
    `dtype`, `shard_bytes`: of what is written."""

    source: Source
    source_sha256: str
    plan: PrunePlan
    scores: Any
    dtype: torch.dtype
    shard_bytes: int

    def to_config(self) -> dict[str, Any]:
        """For a launcher's one rank, which need not hash again."""
        return {"source": str(self.source.path), "source_sha256": self.source_sha256}


def check(r: PruneRecipe) -> StreamedPrepared:
    """Refuse what needs the whole model, a source of another form, and a result that the disk cannot hold.

    Raises:
        InputError: names the value, the place and what is legal.
    """
    _check_settings(r)
    shard_bytes = bytes_of("shard_size", r.shard_size)
    ready = r.prepared or {}
    source = _source(ready.get("source", r.source), r)
    arch = source.architecture
    target, keep_layers = plans.resolve(r.prune, arch)
    steps = plans.targets(r, arch, target, keep_layers)
    _check_scores_are_there(r.prune, arch, target, keep_layers)
    generation_settings(source.tokenizer, arch.vocab_size)
    dtype: torch.dtype = getattr(torch, r.trainer.checkpoint_dtype or source.dtype)
    _check_room(Path(r.run_dir), target.parameters() * dtype.itemsize)
    if arch.share_embeddings_and_output_weights:
        check_tied(read_headers(source.path, f"source={r.source}"), f"source={r.source}")
    sha256 = ready.get("source_sha256") or source.sha256()
    scores = plans.check_importance(r.prune, arch, sha256)
    plan = _plan(r.prune, [arch, *steps], keep_layers, scores, sha256)
    return StreamedPrepared(source, sha256, plan, scores, dtype, shard_bytes)


def _check_settings(r: PruneRecipe) -> None:
    """What needs the model in memory, or ranks."""
    t, p = r.trainer, r.prune
    if t.ranks > 1:
        raise InputError(
            f"stream=true: works in one process, but the layout has {t.ranks} ranks; leave trainer.*_parallel_size at 1"
        )
    for key, value in (("prune.task_file", p.task_file), ("prune.control_seeds", p.control_seeds or None)):
        if value is not None:
            raise InputError(f"{key}={value}: needs the model in memory; with stream=true leave it out")
    if r.data.tokenizer is not None:
        raise InputError(
            f"data.tokenizer={r.data.tokenizer}: with stream=true the student has its source's; leave it out"
        )


def _source(path: str | Path, r: PruneRecipe) -> Source:
    if is_gguf(Path(path).expanduser()):
        raise InputError(f"source={path}: stream=true reads a Hugging Face directory, this is a GGUF file")
    source = find_source(path, data=r.data)
    if source.kind != "huggingface":
        raise InputError(
            f"source={path}: stream=true reads a Hugging Face directory, this is a NeMo 2 checkpoint; make one of it "
            "with python recipes/export.py"
        )
    return source


def _check_scores_are_there(
    p: PruneConfig, source: Architecture, target: Architecture, keep_layers: list[int] | None
) -> None:
    listed = keep_layers is not None and target == source.replace(num_layers=target.num_layers)
    if p.importance == "activation" and p.scores is None and not listed:
        raise InputError(
            "prune.importance=activation: stream=true has no model to score; give prune.scores=FILE, or list the "
            "layers (prune.drop_layers) and cut no width, or say prune.importance=random"
        )


def _check_room(run_dir: Path, size: int) -> None:
    """What an interrupted run has left is gone on with, or makes room."""
    left = [run_dir / CHECKPOINT, run_dir / f".{CHECKPOINT}.tmp"]
    there = sum(file.stat().st_size for place in left for file in place.rglob("*") if file.is_file())
    check_room("run_dir", run_dir, {"the student": size, "files beside it": _BESIDE_WEIGHTS}, there)


def _plan(
    p: PruneConfig,
    steps: list[Architecture],
    keep_layers: list[int] | None,
    scores: Any,
    source_sha256: str,
) -> PrunePlan:
    """One plan of all steps; `steps`: the source, and what is made of it by each."""
    made: list[PrunePlan] = []
    for before, after in pairwise(steps):
        sha256 = artifacts.step_sha256(source_sha256, made)
        if p.importance == "random":
            made.append(plans.random_plan(p, before, after, p.seed + len(made), sha256))
        else:
            made.append(plans.scored_plan(p, before, after, scores, sha256, keep_layers))
    return compose(made)
