"""What `recipes/search.py` measures of a candidate: the pruned model's LM loss, and that after a short distillation."""

import dataclasses
import gc
import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_minitron.axes import PRUNABLE
from nemo_minitron.checkpoints.source import CHECKPOINT
from nemo_minitron.config.recipes import SearchRecipe
from nemo_minitron.environment import rank
from nemo_minitron.files import remove_stale, write_text
from nemo_minitron.importance.pictures import importance_picture
from nemo_minitron.importance.scores import Scores
from nemo_minitron.nemo.prune_transform import prune_model
from nemo_minitron.nemo.session import Session
from nemo_minitron.search.candidates import Candidate
from nemo_minitron.workflows.distill import check as distill_check
from nemo_minitron.workflows.distill import run as distill
from nemo_minitron.workflows.prune import plans, scoring
from nemo_minitron.workflows.search.check import Prepared, short_distillation

CANDIDATES = "candidates"
_DISTILLED = ".distilled"


class Trials:
    """Losses of candidates, remembered in RUN/candidates/NAME.json and RUN/candidates/NAME.distilled.json."""

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

    def distilled_loss(self, candidate: Candidate) -> float:
        """LM loss in nats of the candidate after `search.distill_steps` steps on the source's predictions.

        What the steps leave is deleted but for their losses, RUN/candidates/NAME-DIGEST/steps.jsonl: optimizer states
        of twenty candidates would be many times the source.
        """
        name = candidate.name + _DISTILLED
        directory = self.directory / CANDIDATES / f"{candidate.name}-{self._fingerprint(name)[:8]}"
        if name not in self.remembered:
            pruned = self.loss(candidate)
            result = self._distil(candidate, directory)
            assert abs(result["lm_loss_nats_before"] - pruned) < 1e-2, (
                "another student was saved than measured"
            )
            self._remember(name, result["lm_loss_nats_after"])
        for left in (CHECKPOINT, "nemo", "student"):
            remove_stale(directory / left)
        return self.remembered[name]

    def teacher_loss(self) -> float:
        """The unpruned model's."""
        if "source" not in self.remembered:
            self._remember("source", self._measure(self._session(), "source"))
        return self.remembered["source"]

    def keep(self, candidate: Candidate) -> None:
        """Save the candidate's student, plan and picture as `recipes/prune.py` would."""
        for name in (CHECKPOINT, "plan.json", "importance.png"):
            remove_stale(self.directory / name)
        plan = self._plan(candidate)
        session = self._student(candidate)
        if rank() == 0:
            plan.save(self.directory / "plan.json")
            if self.scores is not None:
                importance_picture(self.scores, plan.kept, self.directory / "importance.png")
        session.save(self.directory / CHECKPOINT)

    def _distil(self, candidate: Candidate, directory: Path) -> dict[str, Any]:
        """Train, or resume a run that was killed, in the candidate's own run directory."""
        student = directory / "student"
        if not (student / CHECKPOINT).is_dir():
            session = self._student(candidate)
            student.mkdir(parents=True, exist_ok=True)
            # As it was measured: `trainer.checkpoint_dtype` is of what the search ends with.
            session.save(student / CHECKPOINT, self.prepared.source.dtype)
            del session
            gc.collect()
        training = short_distillation(self.r, str(student / CHECKPOINT), str(directory))
        training.prepared = {
            "student": training.student,
            "teacher": str(self.prepared.source.path),
            "data": self.prepared.data.to_config(),
        }
        result = distill.run(training, distill_check.check(training), directory)
        # The trainer, its model and its hooks refer to each other.
        gc.collect()
        return result

    def _session(self) -> Any:
        source = self.prepared.source
        return Session(source, self.r.trainer, seq_length=source.seq_length)

    def _student(self, candidate: Candidate) -> Any:
        session = self._session()
        prune_model(session.model, session.chunks, self._plan(candidate))
        return session

    def _plan(self, candidate: Candidate) -> Any:
        p = self.prepared
        before, after, options = p.source.architecture, candidate.architecture, self.r.prune
        if options.importance == "random":
            return plans.random_plan(options, before, after, options.seed, p.source_sha256)
        return plans.scored_plan(options, before, after, self.scores, p.source_sha256, None)

    def _measure(self, session: Any, label: str) -> float:
        return session.lm_loss(self.prepared.data, self.r.data, "valid", self.r.eval.samples, label).nats

    def _scores(self) -> Any:
        """Given, found in the run directory, or made: once for all candidates."""
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
        if rank() == 0:
            scores.save(path)
        self._remember("scores", 0.0)
        return scores

    def _fingerprint(self, name: str) -> str:
        """What a remembered loss depends on beside its sizes."""
        r, p = self.r, self.prepared
        settings = {
            "prune": {k: v for k, v in vars(r.prune).items() if k not in PRUNABLE},
            "source": p.source_sha256,
            "data": [p.data.indexed.manifest_sha256, r.data.seq_length, r.data.seed],
            "eval": r.eval.samples,
            "precision": r.trainer.precision,
        }
        if name.endswith(_DISTILLED):
            training = dataclasses.asdict(short_distillation(r, "", "").distill)
            settings["distill"] = [training, r.seed, r.trainer.checkpoint_dtype]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def _remembered(self) -> dict[str, float]:
        found = {}
        for path in sorted((self.directory / CANDIDATES).glob("*.json")):
            entry = json.loads(path.read_text())
            if entry["fingerprint"] == self._fingerprint(entry["name"]):
                found[entry["name"]] = entry["lm_loss_nats"]
        return found

    def _remember(self, name: str, nats: float) -> None:
        self.remembered[name] = nats
        if rank() == 0:
            path = self.directory / CANDIDATES / f"{name}.json"
            entry = {"name": name, "fingerprint": self._fingerprint(name), "lm_loss_nats": nats}
            write_text(path, json.dumps(entry) + "\n")
