"""What a pruning with `stream=true` refuses and prepares, before anything is written."""

from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import CHECKPOINT, Source
from nemo_minitron.checkpoints.tensor_files import check_tied
from nemo_minitron.checkpoints.weight_files import read_headers
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError
from nemo_minitron.export.huggingface import generation_settings
from nemo_minitron.export.target import bytes_of
from nemo_minitron.importance import block_influence
from nemo_minitron.pruning import PrunePlan, compose
from nemo_minitron.workflows.preflight import (
    STATES,
    check_room,
    check_source,
    check_streamed,
    huggingface_source,
    say_corpus,
)
from nemo_minitron.workflows.prune import artifacts, plans
from nemo_minitron.workflows.prune.data import check_data

_BESIDE_WEIGHTS = 64 << 20  # bytes; tokenizer, plan, scores
_PENDING = ""  # in the place of the source's sha256, in a plan that is made before that is known


@dataclass(frozen=True)
class StreamedPrepared:
    """What is known before a streamed pruning writes. `source`: of kind "huggingface"; `plan`: None where scores have
    to be made first, on `data`; `scores`: those given, or None; `dtype`, `shard_bytes`: of what is written; `hashed`:
    the source's sha256, which may still be at work. A `plan` need not name it yet."""

    source: Source
    hashed: "Future[str]"
    target: Architecture
    keep_layers: list[int] | None
    plan: PrunePlan | None
    scores: Any
    data: PreparedData | None
    dtype: torch.dtype
    shard_bytes: int

    @property
    def source_sha256(self) -> str:
        """Waits for it."""
        return self.hashed.result()

    def by_removal(self, p: PruneConfig) -> bool:
        """Whether layers are chosen by the loss without each."""
        return _by_removal(p, self.source.architecture, self.target, self.keep_layers)

    def to_config(self) -> dict[str, Any]:
        """For a launcher's one rank, which need not hash or index again."""
        data = None if self.data is None else self.data.to_config()
        return {"source": str(self.source.path), "source_sha256": self.source_sha256, "data": data}


def check(r: PruneRecipe) -> StreamedPrepared:
    """Refuse what needs the whole model, a source of another form, and files that the disk cannot hold.

    Raises:
        InputError: names the value, the place and what is legal.
    """
    _check_settings(r)
    shard_bytes = bytes_of("shard_size", r.shard_size)
    ready = r.prepared or {}
    source = huggingface_source(ready.get("source", r.source), "source", r.data)
    arch, where = source.architecture, f"source={r.source}"
    target, keep_layers = plans.resolve(r.prune, arch)
    steps = plans.targets(r, arch, target, keep_layers)
    scored = _is_scored(r.prune, arch, target, keep_layers)
    if scored:
        _check_scoring(r, source, by_score=_chooses_layers(arch, target, keep_layers))
    generation_settings(source.tokenizer, arch.vocab_size)
    dtype: torch.dtype = getattr(torch, r.trainer.checkpoint_dtype or source.dtype)
    size = target.parameters() * dtype.itemsize
    _check_room(r, size)
    if arch.share_embeddings_and_output_weights:
        check_tied(read_headers(source.path, where), where)
    hashed = _hashed(source, ready.get("source_sha256"))
    # Only scores from a file have to be compared with it before anything else is done.
    sha256 = hashed.result() if r.prune.scores is not None else _PENDING
    scores, data, plan = None, None, None
    if scored:
        plans.check_importance(r.prune, arch, sha256)
        plans.try_plans(r.prune, arch, steps, keep_layers, None, sha256)
        data = prepare_data(r.data, str(source.tokenizer), ready.get("data"))
        check_data(r, source, data, None)
        removal = _by_removal(r.prune, arch, target, keep_layers)
        _check_room(r, size, _states_bytes(r, arch, data, removal=removal))
        say_corpus(r.data, data, prepared=bool(ready), what="calibrates")
    else:
        scores = plans.check_importance(r.prune, arch, sha256)
        plan = _plan(r.prune, [arch, *steps], keep_layers, scores, sha256)
    return StreamedPrepared(source, hashed, target, keep_layers, plan, scores, data, dtype, shard_bytes)


def _hashed(source: Source, known: str | None) -> "Future[str]":
    """The sha256 of a source's weights, read behind whatever else is done."""
    found: Future[str] = Future()

    def work() -> None:
        try:
            found.set_result(known or source.sha256())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=work, daemon=True).start()
    return found


def _check_settings(r: PruneRecipe) -> None:
    """What needs the model in memory, or ranks."""
    p = r.prune
    check_streamed(r.trainer)
    for key, value in (("prune.task_file", p.task_file), ("prune.control_seeds", p.control_seeds or None)):
        if value is not None:
            raise InputError(f"{key}={value}: needs the model in memory; with stream=true leave it out")
    if r.data.tokenizer is not None:
        raise InputError(
            f"data.tokenizer={r.data.tokenizer}: with stream=true the student has its source's; leave it out"
        )


def _chooses_layers(source: Architecture, target: Architecture, keep_layers: list[int] | None) -> bool:
    return keep_layers is None and target.num_layers < source.num_layers


def _by_removal(
    p: PruneConfig, source: Architecture, target: Architecture, keep_layers: list[int] | None
) -> bool:
    return _chooses_layers(source, target, keep_layers) and p.layer_metric == "lm_loss"


def _is_scored(
    p: PruneConfig, source: Architecture, target: Architecture, keep_layers: list[int] | None
) -> bool:
    """Whether scores decide, and are not there yet."""
    listed = keep_layers is not None and target == source.replace(num_layers=target.num_layers)
    return p.importance == "activation" and p.scores is None and not listed


def _check_scoring(r: PruneRecipe, source: Source, *, by_score: bool) -> None:
    """Refuse what cannot be scored layer by layer.

    Args:
        by_score: whether scores choose the layers.
    """
    p = r.prune
    if p.iterations > 1:
        raise InputError(
            f"prune.iterations={p.iterations}: with stream=true the source is scored once; must be 1"
        )
    metrics = (*block_influence.METRICS, "lm_loss")
    if by_score and p.layer_metric not in metrics:
        raise InputError(
            f"prune.layer_metric={p.layer_metric}: with stream=true must be one of {', '.join(metrics)}, or be in "
            "prune.scores"
        )
    if by_score and p.contiguous:
        raise InputError(
            "prune.contiguous=true: with stream=true layers are scored one by one; must be false, or list the layers "
            "(prune.drop_layers=late)"
        )
    check_source("source", source, r.trainer, r.data.seq_length)


def _check_room(r: PruneRecipe, size: int, states: int = 0) -> None:
    """What an interrupted run has left is gone on with, or makes room.

    Args:
        size: of the student's weights, in bytes.
        states: of the residual states.
    """
    run_dir = Path(r.run_dir)
    needs = {"the student": size, "files beside it": _BESIDE_WEIGHTS}
    if states:
        needs["residual states"] = states
    left = [run_dir / name for name in (CHECKPOINT, f".{CHECKPOINT}.tmp", STATES)]
    there = sum(file.stat().st_size for place in left for file in place.rglob("*") if file.is_file())
    check_room("run_dir", run_dir, needs, there)


def _states_bytes(r: PruneRecipe, arch: Architecture, data: PreparedData, *, removal: bool) -> int:
    """Of the states before a layer and of those after it; `removal`: also of those without each layer before it."""
    held_out = data.indexed.sequences("valid", r.data.seq_length)
    kinds = 1 + arch.num_layers * removal
    samples = r.prune.calibration_samples * kinds + min(r.eval.samples or held_out, held_out)
    value = 2 if r.trainer.precision.startswith("bf16") else 4
    return 2 * samples * r.data.seq_length * arch.hidden_size * value


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
