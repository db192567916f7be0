"""The work of `recipes/evolve.py`: search for the recipe of a merge, and write the best."""

import time
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import origin
from nemo_minitron.config.evolve import EvolveRecipe
from nemo_minitron.environment import peak_rss_gib, rank
from nemo_minitron.merging.evolution import REFERENCE
from nemo_minitron.merging.report import Shown, write_report
from nemo_minitron.workflows.evolve.check import BOTH, LAYERS, PARAMETERS, Prepared
from nemo_minitron.workflows.evolve.stages import Compared, Found, Stages
from nemo_minitron.workflows.merge import papers, written

UNITS = {"lm_loss": "LM loss, nats a token", "task": "wrong answers", "benchmark": "1 - score"}


def run(r: EvolveRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Measure what the result is compared with, search, write the best; a run that was killed goes on.

    Returns:
        The fields of `result.json`.
    """
    begin = time.monotonic()
    stages = Stages(r, prepared, directory)
    compared = stages.compared()
    found: list[Found] = []
    if r.evolve.space in (PARAMETERS, BOTH):
        found.append(stages.parameters())
    if r.evolve.space in (LAYERS, BOTH):
        found.append(stages.layers(found[-1] if found else None))
    best = min(found, key=lambda one: one.seen)
    fields: dict[str, Any] = {}
    if rank() == 0:
        measured = UNITS[r.evolve.fitness]
        rows = [Shown(c.name, c.seen, c.held_out) for c in compared]
        rows += [Shown(f"evolved: {one.stage}", one.seen, one.held_out) for one in found]
        candidates = list(stages.memory.known.values())
        write_report(candidates, stages.names, rows, measured, directory)
        note = _note(r, rows, measured)
        recipe = papers.recipe_text(best.merge)
        if best.stage == LAYERS and len(found) > 1:
            recipe += "---\n# evolved\n" + papers.recipe_text(found[0].merge)
        fields = written.write(r, prepared.merging, best.merge, best.tensors, directory, recipe, note)
    stages.fitness.session.trainer.strategy.barrier("written")
    return {
        **_result(r, prepared, stages, compared, found, best),
        **fields,
        "search_s": round(time.monotonic() - begin, 2),
        "peak_rss_gib": peak_rss_gib(),
    }


def _note(r: EvolveRecipe, rows: list[Shown], measured: str) -> str:
    lines = [
        f"Found by CMA-ES over {r.evolve.space} (seed {r.seed}), as in "
        "[arXiv 2403.13187](https://arxiv.org/abs/2403.13187).",
        "",
        f"| {measured} | by which the search went | held out |",
        "|---|---|---|",
        *(f"| {row.name} | {row.seen:.4f} | {row.held_out:.4f} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _result(
    r: EvolveRecipe,
    prepared: Prepared,
    stages: Stages,
    compared: list[Compared],
    found: list[Found],
    best: Found,
) -> dict[str, Any]:
    merge = prepared.merging.merge
    return {
        "recipe": "evolve",
        "space": r.evolve.space,
        "fitness": r.evolve.fitness,
        "method": merge.method,
        "models": [origin.absolute(model) for model in merge.models],
        "source": origin.absolute(merge.paths[0]),
        "base": None if merge.base is None else origin.absolute(merge.base),
        "source_sha256": prepared.merging.sha256[0],
        "models_sha256": prepared.merging.sha256,
        "data": r.data.name if prepared.data is not None else None,
        "candidates_tried": sum(c.generation != REFERENCE for c in stages.memory.known.values()),
        "compared": {c.name: {"seen": c.seen, "held_out": c.held_out} for c in compared},
        "evolved": {
            one.stage: {"seen": one.seen, "held_out": one.held_out, "merge": one.merge.plain()}
            for one in found
        },
        "best": best.stage,
        "held_out_loss_best_model": min(c.held_out for c in compared if c.model),
        "held_out_loss": best.held_out,
        "ranks": r.trainer.ranks,
    }
