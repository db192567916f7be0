"""The work of `recipes/prune.py`: load, score, plan, prune, measure before and after, save."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.arch import WIDTH_AXES, Architecture
from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.config.recipes import PruneConfig, PruneRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.run import main as recipe
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted
from nemo_minitron.workflows.prune import iterations, scoring


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded. `source`: of kind "nemo", converted if need be.

    `steps`: the architecture after each step of pruning, the last is the target.
    """

    source: Source
    source_sha256: str
    steps: list[Architecture]
    keep_layers: list[int] | None
    data: PreparedData
    scores: Any
    task: Any

    @property
    def target(self) -> Architecture:
        """What to make of the source."""
        return self.steps[-1]

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks, which need not hash, convert or index again."""
        return {
            "source": str(self.source.path),
            "source_sha256": self.source_sha256,
            "data": self.data.to_config(),
        }


def check(r: PruneRecipe) -> Prepared:
    """Refuse what cannot work; convert the checkpoint and index the data once.

    Raises:
        InputError: see the module's callees; each names the value, the place and what is legal.
    """
    ready = r.prepared or {}
    source = find_source(ready.get("source", r.source), data=r.data)
    check_source("source", source, r.trainer, r.data.seq_length)
    target, keep_layers = _target(r.prune, source.architecture)
    steps = iterations.targets(r, source.architecture, target, keep_layers)
    sha256 = ready.get("source_sha256") or source.sha256()
    scores = scoring.check_importance(r.prune, source.architecture, sha256)
    data = prepare_data(r.data, str(source.tokenizer), ready.get("data"))
    check_data(r, source, data, scores)
    task = load_questions(r.prune, source, data)
    prepared = Prepared(source, sha256, steps, keep_layers, data, scores, task)
    iterations.try_plans(r.prune, source.architecture, steps, keep_layers, scores, sha256)
    return dataclasses.replace(prepared, source=converted(source, r.data))


def check_data(r: PruneRecipe, source: Source, data: PreparedData, scores: Any) -> None:
    """Refuse another tokenizer's data, or too little of it."""
    check_vocabulary(source, data)
    available = data.indexed.tokens["train"] // r.data.seq_length
    if scores is None and r.prune.importance == "activation" and r.prune.calibration_samples > available:
        raise InputError(
            f"prune.calibration_samples={r.prune.calibration_samples}: the train split has only {available} "
            f"sequences of {r.data.seq_length} tokens"
        )


def load_questions(p: PruneConfig, source: Source, data: PreparedData) -> Any:
    """The task of `prune.task_file`, as tokens; None without one."""
    from nemo_minitron.evaluation.multiple_choice import load_task

    if p.task_file is None:
        return None
    with of_setting("prune.task_file"):
        return load_task(p.task_file, data.tokenizer, source.seq_length, beginning=data.indexed.beginning)


def _target(p: PruneConfig, arch: Architecture) -> tuple[Architecture, list[int] | None]:
    """What to make of the source, and the layers that are listed to stay, if they are."""
    from nemo_minitron.pruning import resolve_target
    from nemo_minitron.pruning.ranking import check_protected, explicit_layers

    sizes = {axis: getattr(p, axis) for axis in (*WIDTH_AXES, "num_layers")}
    try:
        target, drop = resolve_target(arch, sizes, p.multiple_of), p.drop_layers
    except InputError as error:  # which begins with the axis
        raise InputError(f"prune.{error}") from None
    if drop == "late":
        last = arch.num_layers - 1
        drop = list(range(last - (arch.num_layers - target.num_layers), last))
    keep = explicit_layers(arch.num_layers, p.keep_layers, drop)
    if keep is not None:
        target = target.replace(num_layers=len(keep) if p.num_layers is None else target.num_layers)
        if len(keep) != target.num_layers:
            raise InputError(f"prune.num_layers={target.num_layers}: but the listed layers keep {len(keep)}")
    elif target.num_layers < arch.num_layers:
        check_protected(arch.num_layers, target.num_layers, p.protect_first, p.protect_last)
    if target == arch:
        axes = ", ".join(f"prune.{axis}" for axis in sizes)
        raise InputError(
            f"prune: all sizes are the source's; choose a preset (+conf=width) or set one of {axes}"
        )
    return target, keep


def run(r: PruneRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Score, plan, prune, measure and save, on every rank of the layout.

    Returns:
        The fields of `result.json`.
    """
    from nemo_minitron.nemo.session import Session
    from nemo_minitron.pruning import compose

    stale = [path.name for path in directory.glob("scores-*.safetensors")]
    for name in (CHECKPOINT, "scores.safetensors", "plan.json", "importance.png", *stale):
        recipe.fresh(directory / name)
    session = Session(
        prepared.source, r.trainer, seq_length=prepared.source.seq_length, tokenizer=r.data.tokenizer
    )
    before = _evaluate(session, r, prepared, "before")
    made = iterations.score_and_prune(session, r, prepared)
    after = _evaluate(session, r, prepared, "after")
    if recipe.rank() == 0:
        compose([plan for _, plan in made]).save(directory / "plan.json")
        scoring.keep_scores(made, directory)
    save(session, directory)
    samples = made[0][0].samples if made[0][0] is not None else 0
    result = _result(r, prepared, before, after, samples, directory)
    return result | _controls(r, prepared, after["loss"].nats, directory)


def _evaluate(session: Any, r: PruneRecipe, prepared: Prepared, when: str) -> dict[str, Any]:
    found = {"loss": session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, f"loss {when}")}
    if prepared.task is not None:
        found["accuracy"] = session.accuracy(prepared.task, r.prune.task_normalize, f"task {when}")
    return found


def _controls(r: PruneRecipe, prepared: Prepared, loss: float, directory: Path) -> dict[str, Any]:
    """Prune the source at random, `prune.control_seeds` times, to the same sizes; a table beside the result."""
    from nemo_minitron.nemo.prune_transform import prune_model
    from nemo_minitron.nemo.session import Session

    if not r.prune.control_seeds:
        return {}
    losses = []
    source = prepared.source
    for seed in range(r.prune.control_seeds):
        session = Session(source, r.trainer, seq_length=source.seq_length)
        plan = iterations.random_plan(
            r.prune, source.architecture, prepared.target, seed, prepared.source_sha256
        )
        prune_model(session.model, session.chunks, plan)
        losses.append(
            session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, f"random seed {seed}").nats
        )
    if recipe.rank() == 0:
        rows = [("importance", loss), *((f"random, seed {seed}", nats) for seed, nats in enumerate(losses))]
        lines = [
            "| kept by | LM loss, nats |",
            "|---|---|",
            *(f"| {name} | {nats:.4f} |" for name, nats in rows),
        ]
        (directory / "control.md").write_text("\n".join(lines) + "\n")
    return {"control_lm_loss_nats": losses, "beats_all_controls": loss < min(losses)}


def save(session: Any, directory: Path, dtype: str | None = None) -> None:
    """The checkpoint appears under its name when it is whole; `dtype` as `Session.save`."""
    temporary = recipe.fresh(directory / f".{CHECKPOINT}.tmp")
    session.save(temporary, dtype)
    if recipe.rank() == 0:
        os.replace(temporary, directory / CHECKPOINT)
    session.trainer.strategy.barrier("renamed")


def _result(
    r: PruneRecipe, p: Prepared, before: Any, after: Any, samples: int, directory: Path
) -> dict[str, Any]:
    source, target = p.source.architecture, p.target
    return {
        "recipe": "prune",
        "source": origin.absolute(r.source),
        "source_sha256": p.source_sha256,
        "data": r.data.name,
        "data_sha256": p.data.indexed.manifest_sha256,
        "params_before": source.parameters(),
        "params_after": target.parameters(),
        "non_embedding_params_before": source.non_embedding_parameters(),
        "non_embedding_params_after": target.non_embedding_parameters(),
        "lm_loss_nats_before": before["loss"].nats,
        "lm_loss_nats_after": after["loss"].nats,
        "eval_samples": after["loss"].samples,
        "eval_tokens": after["loss"].tokens,
        "calibration_samples": samples,
        "importance": r.prune.importance,
        "prune_iterations": r.prune.iterations,
        "prune_seed": r.prune.seed if r.prune.importance == "random" else None,
        "target": json.loads(json.dumps(target.to_dict())),
        **sizes_of(r.prune, source, target),
        "ranks": r.trainer.ranks,
        "tensor_model_parallel_size": r.trainer.tensor_model_parallel_size,
        "pipeline_model_parallel_size": r.trainer.pipeline_model_parallel_size,
        "peak_rss_gib": recipe.peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
        **_task_result(r.prune, p.task, before, after),
    }


def sizes_of(p: PruneConfig, source: Architecture, target: Architecture) -> dict[str, Any]:
    """What is kept of each size that changed, and what a fraction came to before it was rounded to a legal size."""
    from nemo_minitron.pruning.target import PRUNABLE, rounded_from

    pairs = {axis: [getattr(target, axis), getattr(source, axis)] for axis in PRUNABLE}
    asked = {axis: getattr(p, axis) for axis in PRUNABLE}
    return {
        "kept": {axis: pair for axis, pair in pairs.items() if pair[0] != pair[1]},
        "rounded_from": rounded_from(source, target, asked),
    }


def _task_result(p: PruneConfig, task: Any, before: Any, after: Any) -> dict[str, Any]:
    if task is None:
        return {}
    return {
        "task_file": str(p.task_file),
        "task_sha256": task.sha256,
        "task_questions": len(task.answers),
        "task_accuracy_before": before["accuracy"],
        "task_accuracy_after": after["accuracy"],
    }
