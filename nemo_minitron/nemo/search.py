"""The work of `recipes/search.py`: prune to every candidate inside a budget, rank by LM loss, keep the best."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import recipe
from nemo_minitron.config import SearchRecipe
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.errors import InputError
from nemo_minitron.nemo import prune, scoring, stepwise
from nemo_minitron.nemo.checkpoints import CHECKPOINT, Source, find_source
from nemo_minitron.nemo.openings import check_source, converted
from nemo_minitron.pruning.search import (
    Budget,
    Candidate,
    Workload,
    candidates,
    check_grid,
    make_budget,
    search_grid,
    search_optuna,
)
from nemo_minitron.pruning.target import PRUNABLE

METHODS = ("grid", "optuna")


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
    if r.prune.iterations != 1:
        raise InputError(f"prune.iterations={r.prune.iterations}: a search scores the source once; must be 1")
    if s.method not in METHODS:
        raise InputError(f"search.method={s.method}: must be one of {', '.join(METHODS)}")
    for name in ("max_candidates", "trials", "context", "sequences", "bytes_per_value"):
        if getattr(s, name) < 1:
            raise InputError(f"search.{name}={getattr(s, name)}: must be at least 1")
    # An axis that the grid leaves open has the size that the preset gives it.
    fixed = {axis: [v] for axis in PRUNABLE if (v := getattr(r.prune, axis)) is not None}
    grid = {**fixed, **check_grid(s.grid)}
    ready = r.prepared or {}
    source = find_source(ready.get("source", r.source))
    check_source("source", source, r.trainer, r.data.seq_length)
    load = Workload(s.context, s.sequences, s.bytes_per_value)
    budget = make_budget(source.architecture, s.budget, s.slack, load)
    found = candidates(
        source.architecture,
        grid,
        budget,
        load,
        tp=t.tensor_model_parallel_size,
        pp=t.pipeline_model_parallel_size,
    )
    sha256 = ready.get("source_sha256") or source.sha256()
    scores = scoring.check_importance(r.prune, source.architecture, sha256)
    for candidate in found:
        stepwise.try_plans(r.prune, source.architecture, [candidate.architecture], None, scores, sha256)
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
    from nemo_minitron.pruning.search_report import write_report

    trials = _Trials(r, prepared, directory)
    if r.search.method == "optuna":
        found = prepared.candidates
        losses = search_optuna(
            prepared.source.architecture, prepared.grid, found, trials.loss, r.search.trials, r.seed
        )
    else:
        losses = search_grid(prepared.candidates[: r.search.max_candidates], trials.loss)
    tried = sorted(
        (c for c in prepared.candidates if c.name in losses), key=lambda c: (losses[c.name], c.name)
    )
    teacher = trials.teacher_loss()
    if recipe.rank() == 0:
        write_report(tried, losses, prepared.source.architecture, teacher, prepared.load, directory)
    best = tried[0]
    trials.keep(best)
    return _result(r, prepared, best, losses, teacher, directory)


class _Trials:
    """Losses of candidates, remembered in RUN/candidates/NAME.json."""

    def __init__(self, r: SearchRecipe, prepared: Prepared, directory: Path) -> None:
        self.r, self.prepared = r, prepared
        self.directory = directory
        self.remembered = self._remembered()
        self.scores = self._scores()

    def loss(self, candidate: Candidate) -> float:
        """LM loss in nats of the source pruned to the candidate; the same on every rank."""
        if candidate.name not in self.remembered:
            session = self._student(candidate)
            self._remember(candidate.name, self._measure(session, candidate.name))
        return self.remembered[candidate.name]

    def teacher_loss(self) -> float:
        """The unpruned model's."""
        if "source" not in self.remembered:
            self._remember("source", self._measure(self._session(), "source"))
        return self.remembered["source"]

    def keep(self, candidate: Candidate) -> None:
        """Save the candidate's student, plan and picture as `recipes/prune.py` would."""
        from nemo_minitron.importance.pictures import importance_picture

        for name in (CHECKPOINT, "plan.json", "importance.png"):
            recipe.fresh(self.directory / name)
        plan = self._plan(candidate)
        session = self._student(candidate)
        if recipe.rank() == 0:
            plan.save(self.directory / "plan.json")
            if self.scores is not None:
                importance_picture(self.scores, plan.kept, self.directory / "importance.png")
        prune.save(session, self.directory)

    def _session(self) -> Any:
        from nemo_minitron.nemo.session import Session

        source = self.prepared.source
        return Session(source, self.r.trainer, seq_length=source.seq_length)

    def _student(self, candidate: Candidate) -> Any:
        from nemo_minitron.nemo.transforms import prune_model

        session = self._session()
        prune_model(session.model, session.chunks, self._plan(candidate))
        return session

    def _plan(self, candidate: Candidate) -> Any:
        p = self.prepared
        before, after, options = p.source.architecture, candidate.architecture, self.r.prune
        if options.importance == "random":
            return stepwise.random_plan(options, before, after, options.seed, p.source_sha256)
        return stepwise.scored_plan(options, before, after, self.scores, p.source_sha256, None)

    def _measure(self, session: Any, label: str) -> float:
        return session.lm_loss(self.prepared.data, self.r.data, "valid", self.r.eval.samples, label).nats

    def _scores(self) -> Any:
        """Given, found in the run directory, or made: once for all candidates."""
        from nemo_minitron.importance.scores import Scores

        path = self.directory / "scores.safetensors"
        if self.prepared.scores is not None or self.r.prune.importance == "random":
            return self.prepared.scores
        if path.exists() and "scores" in self.remembered:
            return Scores.load(path)
        total = self.prepared.source.architecture.num_layers
        gone = {total - c.architecture.num_layers for c in self.prepared.candidates}
        scores = scoring.score(
            self._session(),
            self.r,
            self.prepared.data,
            self.prepared.task,
            gone=sorted(gone),
            choose_layers=True,
            source_sha256=self.prepared.source_sha256,
        )
        if recipe.rank() == 0:
            scores.save(path)
        self._remember("scores", 0.0)
        return scores

    def _fingerprint(self) -> str:
        """What a remembered loss depends on beside its sizes."""
        r, p = self.r, self.prepared
        settings = {
            "prune": {k: v for k, v in vars(r.prune).items() if k not in PRUNABLE},
            "source": p.source_sha256,
            "data": [p.data.indexed.manifest_sha256, r.data.seq_length, r.data.seed],
            "eval": r.eval.samples,
            "precision": r.trainer.precision,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def _remembered(self) -> dict[str, float]:
        found = {}
        for path in sorted((self.directory / "candidates").glob("*.json")):
            entry = json.loads(path.read_text())
            if entry["fingerprint"] == self._fingerprint():
                found[entry["name"]] = entry["lm_loss_nats"]
        return found

    def _remember(self, name: str, nats: float) -> None:
        self.remembered[name] = nats
        if recipe.rank() == 0:
            path = self.directory / "candidates" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            entry = {"name": name, "fingerprint": self._fingerprint(), "lm_loss_nats": nats}
            temporary.write_text(json.dumps(entry) + "\n")
            os.replace(temporary, path)


def _result(
    r: SearchRecipe,
    p: Prepared,
    best: Candidate,
    losses: dict[str, float],
    teacher: float,
    directory: Path,
) -> dict[str, Any]:
    return {
        "recipe": "search",
        "source": str(r.source),
        "source_sha256": p.source_sha256,
        "data": r.data.name,
        "data_sha256": p.data.indexed.manifest_sha256,
        "method": r.search.method,
        "candidates_inside": len(p.candidates),
        "candidates_tried": len(losses),
        "params_before": p.source.architecture.parameters(),
        "lm_loss_nats_before": teacher,
        "best": best.name,
        "best_sizes": {axis: getattr(best.architecture, axis) for axis in PRUNABLE},
        "params_after": best.costs["parameters"],
        "lm_loss_nats_after": losses[best.name],
        "peak_rss_gib": recipe.peak_rss_gib(),
        "checkpoint": str((directory / CHECKPOINT).resolve()),
    }
