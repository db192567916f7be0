"""What `recipes/prune.py` refuses, and prepares, before a model is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import PruneRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.workflows.preflight import check_source, converted, say_corpus
from nemo_minitron.workflows.prune import plans, streamed_check
from nemo_minitron.workflows.prune.data import check_data, load_questions


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
