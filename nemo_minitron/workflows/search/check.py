"""What `recipes/search.py` refuses, and prepares, before a model is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import DistillRecipe, SearchRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.distillation.loss.settings import DIVERGENCES
from nemo_minitron.errors import InputError
from nemo_minitron.search.candidates import (
    Budget,
    Candidate,
    Workload,
    candidates,
    check_grid,
    make_budget,
)
from nemo_minitron.workflows.distill import settings as distill_checks
from nemo_minitron.workflows.preflight import check_source, converted, say_corpus, settle_rates
from nemo_minitron.workflows.prune import data as prune
from nemo_minitron.workflows.prune import plans


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
        InputError: as `recipes/prune.py`; an invalid budget or grid; no candidate inside.
    """
    s, t = r.search, r.trainer
    for name in ("keep_layers", "drop_layers"):
        if getattr(r.prune, name) is not None:
            raise InputError(
                f"prune.{name}={getattr(r.prune, name)}: a search chooses layers by prune.layer_metric; set it to null"
            )
    if r.prune.iterations != 1:
        raise InputError(f"prune.iterations={r.prune.iterations}: a search scores the source once; must be 1")
    if r.prune.multiple_of is not None:
        raise InputError(
            f"prune.multiple_of={r.prune.multiple_of}: a search takes the sizes of its grid as they are"
        )
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
    scores = plans.check_importance(r.prune, source.architecture, sha256)
    for candidate in found:
        plans.try_plans(r.prune, source.architecture, [candidate.architecture], None, scores, sha256)
    data = prepare_data(r.data, str(source.tokenizer), ready.get("data"))
    prune.check_data(r, source, data, scores)
    task = prune.load_questions(r.prune, source, data)
    say_corpus(r.data, data, prepared=bool(ready), what="calibrates")
    return Prepared(converted(source, r.data), sha256, data, scores, task, grid, budget, load, found)


def check_distillation(r: SearchRecipe, source: Architecture, found: list[Candidate]) -> None:
    """Refuse a short distillation that cannot be made of every candidate.

    Raises:
        InputError: an invalid number of steps or candidates; what `recipes/distill.py` would refuse.
    """
    s = r.search
    if s.distill_candidates is not None and not s.distill_steps:
        raise InputError(
            f"search.distill_candidates={s.distill_candidates}: needs search.distill_steps above 0, or null"
        )
    if not s.distill_steps:
        return
    if r.distill.from_scratch:
        raise InputError("distill.from_scratch=true: a search ranks pruned models; must be false")
    if r.distill.conversations.weight:
        raise InputError(
            f"distill.conversations.weight={r.distill.conversations.weight}: candidates are compared on the corpus; "
            "must be 0"
        )
    _settle_rates(r, found)
    training = short_distillation(r, "", r.run_dir)
    distill_checks.training_layout(training)
    if distill_checks.loss_settings(training) is None:
        raise InputError(
            f"distill.loss={r.distill.loss}: candidates are distilled from the source; must be one of "
            f"{', '.join(DIVERGENCES)}"
        )
    for candidate in found:
        distill_checks.intermediate(training, candidate.architecture, source)


def _settle_rates(r: SearchRecipe, found: list[Candidate]) -> None:
    """One learning rate for all candidates, which are compared: that of the largest.

    Raises:
        InputError: no step is left after the warm-up.
    """
    o, steps = r.distill.optim, r.search.distill_steps
    size = max(candidate.architecture.parameters() for candidate in found)
    settle_rates(o, "distill.optim", size, steps, prepared=r.prepared is not None)
    assert o.warmup_steps is not None, "settled"
    if o.warmup_steps >= steps:
        raise InputError(
            f"search.distill_steps={steps}: must be above distill.optim.warmup_steps={o.warmup_steps}"
        )


def short_distillation(r: SearchRecipe, student: str, run_dir: str) -> DistillRecipe:
    """The distillation of a candidate: the schedule of `distill`, run to its end within `search.distill_steps`."""
    return DistillRecipe(
        run_dir=run_dir,
        seed=r.seed,
        data=r.data,
        trainer=r.trainer,
        eval=r.eval,
        distill=dataclasses.replace(r.distill, max_steps=r.search.distill_steps),
        student=student,
        teacher=r.source,
    )
