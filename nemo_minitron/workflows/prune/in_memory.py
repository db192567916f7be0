"""Pruning a model that memory holds, under a layout: load, score, plan, prune, measure before and after, save."""

from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.environment import rank
from nemo_minitron.files import remove_stale
from nemo_minitron.nemo.prune_transform import prune_model
from nemo_minitron.nemo.session import Session
from nemo_minitron.pruning import compose
from nemo_minitron.workflows.prune import artifacts, iterations, plans
from nemo_minitron.workflows.prune.check import Prepared


def run(r: PruneRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Score, plan, prune, measure and save, on every rank of the layout.

    Returns:
        The fields of `result.json`.
    """
    for path in (directory / CHECKPOINT, directory / artifacts.MARK, *artifacts.stale(directory)):
        remove_stale(path)
    session = Session(
        prepared.source, r.trainer, seq_length=prepared.source.seq_length, tokenizer=r.data.tokenizer
    )
    before = _evaluate(session, r, prepared, "before")
    made = iterations.score_and_prune(session, r, prepared)
    after = _evaluate(session, r, prepared, "after")
    if rank() == 0:
        compose([plan for _, plan in made]).save(directory / "plan.json")
        artifacts.keep_scores(made, directory)
    session.save(directory / CHECKPOINT)
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
    if not r.prune.control_seeds:
        return {}
    losses = []
    source = prepared.source
    for seed in range(r.prune.control_seeds):
        session = Session(source, r.trainer, seq_length=source.seq_length)
        plan = plans.random_plan(r.prune, source.architecture, prepared.target, seed, prepared.source_sha256)
        prune_model(session.model, session.chunks, plan)
        losses.append(
            session.lm_loss(prepared.data, r.data, "valid", r.eval.samples, f"random seed {seed}").nats
        )
    if rank() == 0:
        rows = [("importance", loss), *((f"random, seed {seed}", nats) for seed, nats in enumerate(losses))]
        lines = [
            "| kept by | LM loss, nats |",
            "|---|---|",
            *(f"| {name} | {nats:.4f} |" for name, nats in rows),
        ]
        (directory / "control.md").write_text("\n".join(lines) + "\n")
    return {"control_lm_loss_nats": losses, "beats_all_controls": loss < min(losses)}


def _result(
    r: PruneRecipe, p: Prepared, before: Any, after: Any, samples: int, directory: Path
) -> dict[str, Any]:
    return {
        **artifacts.facts(r, p.source.architecture, p.source_sha256, p.target, samples, directory),
        "data": r.data.name,
        "data_sha256": p.data.indexed.manifest_sha256,
        "lm_loss_nats_before": before["loss"].nats,
        "lm_loss_nats_after": after["loss"].nats,
        "eval_samples": after["loss"].samples,
        "eval_tokens": after["loss"].tokens,
        "ranks": r.trainer.ranks,
        "tensor_model_parallel_size": r.trainer.tensor_model_parallel_size,
        "pipeline_model_parallel_size": r.trainer.pipeline_model_parallel_size,
        **_task_result(r.prune, p.task, before, after),
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
