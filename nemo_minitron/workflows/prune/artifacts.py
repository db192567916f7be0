"""What a pruning leaves beside the student: scores, their picture, and the fields of its result that need no model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints import origin
from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.importance.pictures import importance_picture
from nemo_minitron.pruning.target import rounded_from

# Says which student an unfinished streamed pruning has begun to write.
MARK = f".{CHECKPOINT}.state"


def step_sha256(source_sha256: str, plans: Sequence[Any]) -> str:
    """Identity of the model that `plans` have made of the source: the source's own before the first."""
    if not plans:
        return source_sha256
    kept = json.dumps([plan.to_dict()["kept"] for plan in plans], sort_keys=True)
    return hashlib.sha256(f"{source_sha256} {kept}".encode()).hexdigest()


def scores_name(step: int) -> str:
    """The file of a step's scores; the first ones' indices are those of the source."""
    return "scores.safetensors" if step == 0 else f"scores-{step + 1}.safetensors"


def keep_scores(made: Sequence[tuple[Any, Any]], directory: Path) -> None:
    """Write the scores of each step, and the picture of the first with what its own plan keeps.

    Args:
        made: (scores, plan) of each step; a random one has no scores, and leaves nothing.
    """
    for step, (scores, plan) in enumerate(made):
        if scores is None:
            continue
        scores.save(directory / scores_name(step))
        if step == 0:
            importance_picture(scores, plan.kept, directory / "importance.png")


def stale(directory: Path) -> list[Path]:
    """What an earlier run may have left beside a student."""
    names = ("scores.safetensors", "plan.json", "importance.png")
    return [*(directory / name for name in names), *directory.glob("scores-*.safetensors")]


def facts(
    r: PruneRecipe,
    source: Architecture,
    source_sha256: str,
    target: Architecture,
    samples: int,
    directory: Path,
) -> dict[str, Any]:
    """Fields of `result.json` that say what was pruned to what.

    Args:
        samples: that the scores were made of; 0: there are none.
    """
    return {
        "recipe": "prune",
        "source": origin.absolute(r.source),
        "source_sha256": source_sha256,
        "params_before": source.parameters(),
        "params_after": target.parameters(),
        "non_embedding_params_before": source.non_embedding_parameters(),
        "non_embedding_params_after": target.non_embedding_parameters(),
        "calibration_samples": samples,
        "importance": r.prune.importance,
        "prune_iterations": r.prune.iterations,
        "prune_seed": r.prune.seed if r.prune.importance == "random" else None,
        "target": json.loads(json.dumps(target.to_dict())),
        **_sizes_of(r.prune, source, target),
        "peak_rss_gib": peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }


def _sizes_of(p: PruneConfig, source: Architecture, target: Architecture) -> dict[str, Any]:
    """What is kept of each size that changed, and what a fraction came to before it was rounded to a legal size."""
    pairs = {axis: [getattr(target, axis), getattr(source, axis)] for axis in PRUNABLE}
    asked = {axis: getattr(p, axis) for axis in PRUNABLE}
    return {
        "kept": {axis: pair for axis, pair in pairs.items() if pair[0] != pair[1]},
        "rounded_from": rounded_from(source, target, asked),
    }
