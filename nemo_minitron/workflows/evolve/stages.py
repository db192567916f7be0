"""The searches of `recipes/evolve.py`: each fills a model with candidates, and remembers what they are measured as."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_minitron import parallel
from nemo_minitron.config.evolve import EvolveRecipe
from nemo_minitron.environment import rank
from nemo_minitron.merging.evolution import WORST, Candidate, Memory, one_a_worker, reference, search
from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.models import Kept, Merged, Read, Tensors
from nemo_minitron.merging.path import Laid, every_layer, folds, text_of
from nemo_minitron.merging.settings import PATH, Merge, number
from nemo_minitron.merging.spaces import Layers, Parameters, population_of
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.evolve.check import LAYERS, PARAMETERS, Prepared, layers_space
from nemo_minitron.workflows.evolve.fitness import Fitness

HISTORY = "candidates.jsonl"


@dataclass(frozen=True)
class Found:
    """The best candidate of a search: as a merge, its tensors, and what both measures say of it."""

    stage: str
    merge: Merge
    tensors: Tensors
    seen: float
    held_out: float


@dataclass(frozen=True)
class Compared:
    """A model that the result is compared with; `model`: whether it is one of the merged."""

    name: str
    seen: float
    held_out: float
    model: bool


class Stages:
    """The searches of a run.

    Args:
        directory: of the run; holds what is remembered.
    """

    def __init__(self, r: EvolveRecipe, prepared: Prepared, directory: Path) -> None:
        self.r, self.prepared = r, prepared
        self.readers: list[Read] = [Kept(reader) for reader in prepared.merging.readers]
        self.memory = Memory(directory / HISTORY, self._fingerprint(), writes=rank() == 0)
        self.memory.take(parallel.broadcast_object(self.memory.known))
        self.names: dict[str, list[str]] = {}
        self.fitness = Fitness(r, prepared, prepared.merging.sources[0].architecture)

    def compared(self) -> list[Compared]:
        """Each model, their plain mean, and merges by every method with the numbers that the user gave."""
        merge = self.prepared.merging.merge
        names = [Path(path).name for path in merge.paths]
        single = [
            self._compare(f"{name} ({self._role(i)})", self._alone(i), model=True)
            for i, name in enumerate(names)
        ]
        mean = self._compare("plain mean", self._merged(self._mean()))
        untuned = [self._compare(f"{m.method}, not tuned", self._merged(m)) for m in self._untuned()]
        return [*single, mean, *untuned]

    def _mean(self) -> Merge:
        models = self.prepared.merging.merge.models
        ones = tuple(number(1.0) for _ in models)
        return Merge("linear", models, None, ones, ones)

    def _untuned(self) -> list[Merge]:
        """By each method that has the models it needs, but for the mean."""
        merge, found = self.prepared.merging.merge, []
        for name, method in METHODS.items():
            most = method.most or len(merge.models)
            mean = name == "linear" and (merge.method != name or merge.weights == self._mean().weights)
            lacks = method.base and merge.base is None
            if mean or lacks or not method.least <= len(merge.models) <= most:
                continue
            own = merge.normalize if name == merge.method else None
            base = merge.base if method.base else None
            found.append(replace(merge, method=name, base=base, normalize=own))
        return found

    def _role(self, index: int) -> str:
        base = self.prepared.merging.merge.base is not None
        return "base" if base and index == 0 else f"model {index - base}"

    def _alone(self, index: int) -> Tensors:
        path = self.prepared.merging.merge.paths[index]
        one = Merge("linear", (path,), None, (number(1.0),), (number(1.0),))
        return Merged(self._arch, one, None, [self.readers[index]])

    def _merged(self, merge: Merge) -> Merged:
        base = self.readers[0] if merge.base is not None else None
        models = self.readers[-len(merge.models) :]
        return Merged(self._arch, merge, base, models)

    @property
    def _arch(self) -> Any:
        return self.prepared.merging.sources[0].architecture

    def _compare(self, name: str, tensors: Tensors, *, model: bool = False) -> Compared:
        seen, held_out = self._both(name, tensors, lambda measure: measure())
        return Compared(name, seen, held_out, model)

    def _both(
        self, name: str, tensors: Tensors | None, within: Callable[[Callable[[], float]], float]
    ) -> tuple[float, float]:
        """Both losses of a model, remembered by its name; it is filled in only where one is not known."""
        filled = tensors is None

        def measured(measure: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                nonlocal filled
                if not filled:
                    assert tensors is not None
                    self.fitness.fill(tensors)
                    filled = True
                return within(measure)

            return run

        losses = self.fitness.losses
        return (
            reference(f"seen: {name}", self.memory, measured(losses.seen)),
            reference(f"held out: {name}", self.memory, measured(losses.held_out)),
        )

    def parameters(self) -> Found:
        """Search for the numbers of the merge."""
        merge = self.prepared.merging.merge
        space = Parameters(merge, self.r.evolve.groups, self.r.evolve.largest_weight)

        def evaluate(vector: Sequence[float]) -> float:
            self.fitness.fill(self._merged(space.merge_of(vector)))
            return self.fitness.losses.seen()

        best = self._search(PARAMETERS, space, evaluate)
        found = space.merge_of(best.vector)
        tensors = self._merged(found)
        seen, held_out = self._both(_label(PARAMETERS, best), tensors, lambda measure: measure())
        return Found(PARAMETERS, found, tensors, seen, held_out)

    def layers(self, before: Found | None = None) -> Found:
        """Search for a path through the layers of the models, and of what an earlier search has found."""
        merge = self.prepared.merging.merge
        counts = [source.architecture.num_layers for source in self.prepared.merging.sources]
        readers, names = list(self.readers), list(merge.paths)
        if before is not None:
            # First, so that the search begins with it.
            readers, names = [Kept(before.tensors), *readers], ["evolved", *names]
            counts = [before.tensors.architecture.num_layers, *counts]
        layers = tuple(counts)
        space = layers_space(self.r, layers)
        every = Laid(every_layer(layers), readers, self._arch, folded=False)
        del self.fitness  # its memory goes before that of a model of another depth comes
        self.fitness = Fitness(self.r, self.prepared, every.architecture)
        self.fitness.fill(every)

        def evaluate(vector: Sequence[float]) -> float:
            return self._walked(space, vector, layers, self.fitness.losses.seen)

        best = self._search(LAYERS, space, evaluate)
        path = space.path_of(best.vector)
        laid = Laid(path, readers, self._arch, folded=folds(path))
        seen, held_out = self._both(
            _label(LAYERS, best), None, lambda measure: self._walked(space, best.vector, layers, measure)
        )
        found = replace(
            Merge(PATH, tuple(names), None, (), ()), path=text_of(path), tokenizer=merge.tokenizer
        )
        return Found(LAYERS, found, laid, seen, held_out)

    def _walked(
        self, space: Layers, vector: Sequence[float], layers: tuple[int, ...], measure: Callable[[], float]
    ) -> float:
        path, most = space.path_of(vector), self.r.evolve.most_layers
        if not path or (most is not None and len(path) > most):
            return WORST
        with self.fitness.walking(path, layers):
            return measure()

    def _search(
        self, stage: str, space: Parameters | Layers, evaluate: Callable[[Sequence[float]], float]
    ) -> Candidate:
        e = self.r.evolve
        self.names[stage] = space.names

        @functools.cache  # made when there is something to show: a refusal is one line
        def bar() -> Callable[[int], None]:
            return progress_bar(f"candidates of {stage}", count, unit="candidates")

        # A benchmark is asked by the first rank, and the others take part in every answer.
        workers = 1 if e.fitness == "benchmark" else parallel.dp_size()
        count = e.generations * (e.population or population_of(len(space.names)))
        return search(
            stage,
            space,
            one_a_worker(evaluate) if workers > 1 else lambda vectors: [evaluate(v) for v in vectors],
            self.memory,
            generations=e.generations,
            population=e.population,
            sigma=e.sigma,
            seed=self.r.seed,
            workers=workers,
            progress=lambda done: bar()(done),
        )

    def _fingerprint(self) -> str:
        """What a remembered loss depends on."""
        r, p = self.r, self.prepared
        settings = {
            "merge": p.merging.merge.plain(),
            "models": p.merging.sha256,
            "evolve": {k: v for k, v in asdict(r.evolve).items() if k != "generations"},
            "data": None
            if p.data is None
            else [p.data.indexed.manifest_sha256, r.data.seq_length, r.data.seed],
            "tasks": [task and task.sha256 for task in (p.task, p.held_out)],
            "eval": [r.eval.samples, r.eval.max_new_tokens],
            "precision": r.trainer.precision,
            "seed": r.seed,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _label(stage: str, best: Candidate) -> str:
    return f"{stage} {best.generation}.{best.number}"
