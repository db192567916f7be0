"""What `recipes/prune.py` refuses, and prepares, before a model is loaded."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import PruneConfig, PruneRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation.multiple_choice import load_task
from nemo_minitron.pruning import resolve_target
from nemo_minitron.pruning.ranking import check_protected, explicit_layers
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted, say_corpus
from nemo_minitron.workflows.prune import plans

logger = logging.getLogger("nemo_minitron")


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
    steps = plans.targets(r, source.architecture, target, keep_layers)
    sha256 = ready.get("source_sha256") or source.sha256()
    scores = plans.check_importance(r.prune, source.architecture, sha256)
    data = prepare_data(r.data, str(source.tokenizer), ready.get("data"))
    check_data(r, source, data, scores)
    task = load_questions(r.prune, source, data)
    prepared = Prepared(source, sha256, steps, keep_layers, data, scores, task)
    plans.try_plans(r.prune, source.architecture, steps, keep_layers, scores, sha256)
    say_corpus(r.data, data, prepared=bool(ready), what="calibrates")
    return dataclasses.replace(prepared, source=converted(source, r.data))


def check_data(r: PruneRecipe, source: Source, data: PreparedData, scores: Any) -> None:
    """Refuse another tokenizer's data, or too little of it."""
    check_vocabulary(source, data)
    available = data.indexed.sequences("train", r.data.seq_length)
    if r.data.tokens is not None and r.prune.calibration_samples > available:
        logger.warning(
            "data.tokens=%s: more than the data has without repeats; all of it is read", r.data.tokens
        )
        r.prune.calibration_samples = available
    if scores is None and r.prune.importance == "activation" and r.prune.calibration_samples > available:
        raise InputError(
            f"prune.calibration_samples={r.prune.calibration_samples}: the train split has only {available} "
            f"sequences of {r.data.seq_length} tokens"
        )


def load_questions(p: PruneConfig, source: Source, data: PreparedData) -> Any:
    """The task of `prune.task_file`, as tokens; None without one."""
    if p.task_file is None:
        return None
    with of_setting("prune.task_file"):
        return load_task(p.task_file, data.tokenizer, source.seq_length, beginning=data.indexed.beginning)


def _target(p: PruneConfig, arch: Architecture) -> tuple[Architecture, list[int] | None]:
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
