"""The work of `recipes/search.py`: prune to every candidate inside a budget, rank by LM loss, keep the best."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import CHECKPOINT, Source, find_source
from nemo_minitron.config.recipes import SearchRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.target import PRUNABLE
from nemo_minitron.run import main as recipe
from nemo_minitron.search.candidates import (
    Budget,
    Candidate,
    Workload,
    candidates,
    check_grid,
    make_budget,
    search_grid,
    search_optuna,
)
from nemo_minitron.workflows.preflight import check_source, converted
from nemo_minitron.workflows.prune import iterations, scoring
from nemo_minitron.workflows.prune import run as prune
from nemo_minitron.workflows.search.trials import Trials, check_distillation


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded."""

    source: Source
    source_sha256: str
    data: PreparedData
    scores: Any
    task: Any
    grid: dict[str, list[Any]]
    budget: Budget
    load: Workload
    candidates: list[Candidate]

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "source": str(self.source.path),
            "source_sha256": self.source_sha256,
            "data": self.data.to_config(),
        }


def check(r: SearchRecipe) -> Prepared:
    """Refuse what cannot work, enumerate the candidates, convert the checkpoint and index the data once.

    Raises:
        InputError: as `recipes/prune.py`; a budget or grid that is none; no candidate inside.
    """
    s, t = r.search, r.trainer
    for name in ("keep_layers", "drop_layers"):
        if getattr(r.prune, name) is not None:
            raise InputError(
                f"prune.{name}={getattr(r.prune, name)}: a search chooses layers by prune.layer_metric; set it to null"
            )
    if r.prune.multiple_of is not None:
        raise InputError(
            f"prune.multiple_of={r.prune.multiple_of}: a search takes the sizes of its grid as they are"
        )
    if r.prune.iterations != 1:
        raise InputError(f"prune.iterations={r.prune.iterations}: a search scores the source once; must be 1")
    # An axis that the grid leaves open has the size that the preset gives it.
    fixed = {axis: [v] for axis in PRUNABLE if (v := getattr(r.prune, axis)) is not None}
    grid = {**fixed, **check_grid(s.grid or {})}
    ready = r.prepared or {}
    source = find_source(ready.get("source", r.source), data=r.data)
    check_source("source", source, r.trainer, r.data.seq_length)
    load = Workload(s.context, s.sequences, s.bytes_per_value)
    budget = make_budget(source.architecture, s.budget or {}, s.slack, load)
    found = candidates(
        source.architecture,
        grid,
        budget,
        load,
        tp=t.tensor_model_parallel_size,
        pp=t.pipeline_model_parallel_size,
    )
    check_distillation(r, source.architecture, found)
    sha256 = ready.get("source_sha256") or source.sha256()
    scores = scoring.check_importance(r.prune, source.architecture, sha256)
    for candidate in found:
        iterations.try_plans(r.prune, source.architecture, [candidate.architecture], None, scores, sha256)
    data = prepare_data(r.data, str(source.tokenizer), ready.get("data"))
    prune.check_data(r, source, data, scores)
    task = prune.load_questions(r.prune, source, data)
    return Prepared(converted(source, r.data), sha256, data, scores, task, grid, budget, load, found)


def run(r: SearchRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Score once, try the candidates, write the table and the plot, and keep the best student.

    A run that was killed goes on: scores and finished candidates are found in the run directory again.

    Returns:
        The fields of `result.json`.
    """
    from nemo_minitron.search.report import write_report

    trials = Trials(r, prepared, directory)
    pruned, distilled = _try(r, prepared, trials)
    tried = sorted(
        (c for c in prepared.candidates if c.name in pruned),
        key=lambda c: (c.name not in distilled, distilled.get(c.name, pruned[c.name]), c.name),
    )
    teacher = trials.teacher_loss()
    if recipe.rank() == 0:
        write_report(
            tried, pruned, distilled, prepared.source.architecture, teacher, prepared.load, directory
        )
    best = tried[0]
    trials.keep(best)
    return _result(r, prepared, best, pruned, distilled, teacher, directory)


def _try(r: SearchRecipe, prepared: Prepared, trials: Trials) -> tuple[dict[str, float], dict[str, float]]:
    """LM losses by candidate name, in nats: after pruning, and of those that are distilled after that.

    Where all are distilled, the loss after it is also what Optuna goes by.
    """
    s, found = r.search, prepared.candidates
    every = s.distill_steps > 0 and s.distill_candidates is None
    loss = trials.distilled_loss if every else trials.loss
    if s.method == "optuna":
        tried = search_optuna(prepared.source.architecture, prepared.grid, found, loss, s.trials, r.seed)
    else:
        tried = search_grid(found[: s.max_candidates], loss)
    chosen = [c for c in found if c.name in tried]
    pruned = {c.name: trials.loss(c) for c in chosen}
    if not s.distill_steps:
        return pruned, {}
    best = sorted(chosen, key=lambda c: (pruned[c.name], c.name))[: s.distill_candidates]
    return pruned, {c.name: trials.distilled_loss(c) for c in best}


def _result(
    r: SearchRecipe,
    p: Prepared,
    best: Candidate,
    pruned: dict[str, float],
    distilled: dict[str, float],
    teacher: float,
    directory: Path,
) -> dict[str, Any]:
    return {
        "recipe": "search",
        "source": origin.absolute(r.source),
        "source_sha256": p.source_sha256,
        "data": r.data.name,
        "data_sha256": p.data.indexed.manifest_sha256,
        "method": r.search.method,
        "candidates_inside": len(p.candidates),
        "candidates_tried": len(pruned),
        "candidates_distilled": len(distilled),
        "distill_steps": r.search.distill_steps,
        "params_before": p.source.architecture.parameters(),
        "lm_loss_nats_before": teacher,
        "best": best.name,
        "best_sizes": {axis: getattr(best.architecture, axis) for axis in PRUNABLE},
        "params_after": best.costs["parameters"],
        "lm_loss_nats_after": pruned[best.name],
        "lm_loss_nats_distilled": distilled.get(best.name),
        "peak_rss_gib": recipe.peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }
