"""The work of `recipes/search.py`: prune to every candidate inside a budget, rank by LM loss, keep the best."""

from pathlib import Path
from typing import Any

from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.config.recipes import SearchRecipe
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.search.candidates import (
    Candidate,
    search_grid,
    search_optuna,
)
from nemo_minitron.search.report import write_report
from nemo_minitron.workflows.search.check import Prepared
from nemo_minitron.workflows.search.trials import Trials


def run(r: SearchRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Score once, try the candidates, write the table and the plot, and keep the best student.

    A run that was killed goes on: scores and finished candidates are found in the run directory again.

    Returns:
        The fields of `result.json`.
    """
    trials = Trials(r, prepared, directory)
    pruned, distilled = _try(r, prepared, trials)
    tried = sorted(
        (c for c in prepared.candidates if c.name in pruned),
        key=lambda c: (c.name not in distilled, distilled.get(c.name, pruned[c.name]), c.name),
    )
    teacher = trials.teacher_loss()
    if rank() == 0:
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
        "peak_rss_gib": peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }
