"""Pruning in one or several steps: score, plan, prune, and again on what is left."""

from typing import Any

from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.importance.scores import Scores
from nemo_minitron.nemo.prune_transform import prune_model
from nemo_minitron.pruning import PrunePlan
from nemo_minitron.workflows.prune import artifacts, plans, scoring
from nemo_minitron.workflows.prune.check import Prepared


def score_and_prune(
    session: Any, r: PruneRecipe, prepared: Prepared
) -> list[tuple[Scores | None, PrunePlan]]:
    """Prune the session's model in place; every rank makes this call.

    Returns:
        (scores, or None at random; plan) of each step; a plan is for the model that the steps before it have left.
    """
    p = r.prune
    made: list[tuple[Scores | None, PrunePlan]] = []
    before, listed = prepared.source.architecture, prepared.keep_layers
    for after in prepared.steps:
        sha256, scores = artifacts.step_sha256(prepared.source_sha256, [plan for _, plan in made]), None
        if p.importance == "random":
            plan = plans.random_plan(p, before, after, p.seed + len(made), sha256)
        else:
            scores = prepared.scores or scoring.score(
                session,
                r,
                prepared.data,
                prepared.task,
                gone=[before.num_layers - after.num_layers],
                choose_layers=listed is None,
                source_sha256=sha256,
            )
            plan = plans.scored_plan(p, before, after, scores, sha256, listed)
        prune_model(session.model, session.chunks, plan)
        made.append((scores, plan))
        before, listed = after, None
    return made
