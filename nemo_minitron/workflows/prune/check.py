"""What `recipes/prune.py` refuses, and prepares, before a model is loaded."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.prune import PruneConfig
from nemo_minitron.config.recipes import PruneRecipe, ScoredRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError, of_setting
from nemo_minitron.evaluation.multiple_choice import load_task
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted, say_corpus
from nemo_minitron.workflows.prune import plans, streamed_check

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


def check(r: PruneRecipe) -> Any:
    """Refuse what cannot work; convert the checkpoint and index the data once.

    Returns:
        `Prepared`, or with `stream=true` what `streamed_check` prepares.

    Raises:
        InputError: see the module's callees; each names the value, the place and what is legal.
    """
    if r.stream:
        return streamed_check.check(r)
    ready = r.prepared or {}
    source = find_source(ready.get("source", r.source), data=r.data)
    check_source("source", source, r.trainer, r.data.seq_length)
    target, keep_layers = plans.resolve(r.prune, source.architecture)
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


def check_data(r: ScoredRecipe, source: Source, data: PreparedData, scores: Any) -> None:
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
