"""The plans of a pruning in one or several steps, tried before a model is loaded."""

from collections.abc import Sequence
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import PRUNABLE
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.importance import block_influence, depth_metrics
from nemo_minitron.importance.scores import Scores
from nemo_minitron.pruning import check_target, make_plan, resolve_target, step_targets
from nemo_minitron.pruning.ranking import check_protected, explicit_layers


def resolve(p: PruneConfig, arch: Architecture) -> tuple[Architecture, list[int] | None]:
    """What to make of the source, and the layers that are listed to stay, if they are."""
    sizes = {axis: getattr(p, axis) for axis in PRUNABLE}
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


def targets(
    r: PruneRecipe, arch: Architecture, target: Architecture, keep_layers: list[int] | None
) -> list[Architecture]:
    """The architecture after each of `prune.iterations` steps.

    Raises:
        InputError: steps that cannot be made, or that the layout cannot hold.
    """
    p, t = r.prune, r.trainer
    if p.iterations > 1:
        _check_iterations(p, chosen=keep_layers is None and target.num_layers < arch.num_layers)
    steps = step_targets(arch, target, p.iterations, layers_at_once=keep_layers is not None)
    for number, (before, after) in enumerate(zip([arch, *steps], steps, strict=False), 1):
        try:
            check_target(before, after, tp=t.tensor_model_parallel_size, pp=t.pipeline_model_parallel_size)
        except InputError as error:
            if number == len(steps):
                raise
            raise InputError(f"prune.iterations={p.iterations}, after step {number}: {error}") from None
    return steps


def _check_iterations(p: PruneConfig, chosen: bool) -> None:
    """`chosen`: the scores decide which layers go."""
    said = f"prune.iterations={p.iterations}: every step is scored anew,"
    if p.scores is not None:
        raise InputError(f"{said} so prune.scores={p.scores} cannot be used; leave one of the two out")
    if p.head_residual:
        raise InputError(
            f"{said} and prune.head_residual=true cannot be told in one plan of all; use one step"
        )
    if p.contiguous and chosen:
        raise InputError(f"{said} and prune.contiguous=true drops one block; use one step")


def check_importance(p: PruneConfig, arch: Architecture, sha256: str) -> Any:
    """The given scores, checked against the source; None where they are to be made.

    Raises:
        InputError: an unknown layer metric; scores of another model; a metric without its
            task.
    """
    if p.scores is not None:
        with of_setting("prune.scores"):
            scores = Scores.load(p.scores)
        scores.check_matches(arch, sha256)
        return scores
    metrics = (*block_influence.METRICS, *depth_metrics.METRICS)
    if p.layer_metric not in metrics:
        raise InputError(
            f"prune.layer_metric={p.layer_metric}: must be one of {', '.join(metrics)}, or be in prune.scores"
        )
    if p.layer_metric == "task" and p.task_file is None and p.importance == "activation":
        raise InputError("prune.layer_metric=task: needs the questions, prune.task_file=FILE.jsonl")
    return None


def try_plans(
    p: PruneConfig,
    arch: Architecture,
    steps: Sequence[Architecture],
    keep_layers: list[int] | None,
    scores: Any,
    sha256: str,
) -> None:
    """Make the plans from the given scores, or from random scores if there are none yet, to prove that plans exist.

    Raises:
        InputError: sizes that no scores could make a plan of, or given scores that hold too little.
    """
    for step, (before, after) in enumerate(zip([arch, *steps], steps, strict=False)):
        if p.importance == "random":
            random_plan(p, before, after, p.seed + step, sha256)
        else:
            scored_plan(p, before, after, scores, sha256, keep_layers, dry=scores is None)
        keep_layers = None


def random_plan(p: PruneConfig, before: Architecture, after: Architecture, seed: int, sha256: str) -> Any:
    """The control: it takes neither the listed layers nor a head residual."""
    return make_plan(before, after, importance="random", seed=seed, source_sha256=sha256, **_limits(p))


def scored_plan(
    p: PruneConfig,
    before: Architecture,
    after: Architecture,
    scores: Any,
    sha256: str,
    keep_layers: list[int] | None,
    *,
    dry: bool = False,
) -> Any:
    """The plan by scores; `dry`: by random ones, to see whether there is one."""
    return make_plan(
        before,
        after,
        scores,
        importance="random" if dry else "activation",
        source_sha256=sha256,
        keep_layers=keep_layers,
        layer_metric=p.layer_metric,
        head_residual=p.head_residual,
        **_limits(p),
    )


def _limits(p: PruneConfig) -> dict[str, Any]:
    names = ("contiguous", "protect_first", "protect_last")
    return {name: getattr(p, name) for name in names}
