"""CMA-ES over a space, remembered candidate by candidate: a search that was killed goes on where it was.

The search itself is the package cma's. It is seeded and everything runs in order, so that every rank, and a run that
goes on, asks for the same candidates: known ones are answered from what was written down.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nemo_minitron import parallel
from nemo_minitron.errors import InputError, need_package
from nemo_minitron.files import read_steps, write_text
from nemo_minitron.merging.spaces import Space, population_of

# In place of a loss that is no number: worse than all others, and cma takes only finite ones.
WORST = 1e9
_MOST_COVARIANCES = 1000
# The generation of what a result is compared with.
REFERENCE = -1


@dataclass(frozen=True)
class Candidate:
    """One that was measured. `stage`: the space that was searched; `vector`: from 0 to 1; `loss`: less is better."""

    stage: str
    generation: int
    number: int
    vector: list[float]
    loss: float


Key = tuple[str, int, int]


def _key(c: Candidate) -> Key:
    return c.stage, c.generation, c.number


class Memory:
    """Candidates in a file of JSON lines; other ranks than the first are told, and write nothing.

    Args:
        file: made when there is something to write.
        fingerprint: of all that a loss depends on; what was remembered under another is not taken.
        writes: whether this rank is the one that writes.
    """

    def __init__(self, file: Path, fingerprint: str, *, writes: bool) -> None:
        self.file, self.writes = file, writes
        lines = read_steps(file) if file.exists() else []
        taken = bool(lines) and lines[0].get("fingerprint") == fingerprint
        self.known = {_key(c): c for c in (Candidate(**line) for line in lines[1:])} if taken else {}
        self._head = {"fingerprint": fingerprint}
        self._begun = False

    def take(self, known: dict[Key, Candidate]) -> None:
        """Rank 0's, so that all ranks know the same."""
        self.known = known

    def find(self, candidate: Candidate) -> float | None:
        """A remembered loss; None for another vector in its place."""
        found = self.known.get(_key(candidate))
        same = found is not None and np.allclose(found.vector, candidate.vector, rtol=0, atol=1e-9)
        return found.loss if found is not None and same else None

    def add(self, candidate: Candidate) -> None:
        """Write one down; it is on the disk when this returns."""
        self.known[_key(candidate)] = candidate
        if not self.writes:
            return
        if not self._begun:
            self._rewrite()
            return
        with open(self.file, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(asdict(candidate)) + "\n")

    def _rewrite(self) -> None:
        """The file as it is to be: without a line that a kill cut short."""
        lines = [self._head, *map(asdict, self.known.values())]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        self._begun = True


def check_package() -> None:
    """Refuse to search without cma.

    Raises:
        InputError: it is not installed.
    """
    need_package("cma", "evolve", "dev,search")


def check_size(space: Space, why: str) -> None:
    """Refuse a space of less than two numbers, which CMA-ES does not search.

    Raises:
        InputError: names the setting.
    """
    if len(space.names) < 2:
        raise InputError(f"{why}: leaves {len(space.names)} number to search for; CMA-ES needs at least 2")


Evaluate = Callable[[Sequence[list[float]]], Sequence[float]]


def search(
    stage: str,
    space: Space,
    evaluate: Evaluate,
    memory: Memory,
    *,
    generations: int,
    population: int | None,
    sigma: float,
    seed: int,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Candidate:
    """The best candidate of `generations` times `population`.

    Args:
        evaluate: losses of at most `workers` candidates; less is better; the same on every rank.
        seed: of what is drawn.
        progress: told how many candidates are measured.

    Raises:
        InputError: all candidates of the first generation have the same loss.
    """
    import cma

    options = {
        "bounds": [0, 1],
        "popsize": population or population_of(len(space.names)),
        "seed": seed + 1,  # 0 would be the clock
        "randn": np.random.RandomState(seed % 2**32).randn,
        "verbose": -9,
        # Without covariances where their matrix would take longer than the candidates do.
        "CMA_diagonal": len(space.names) > _MOST_COVARIANCES,
    }
    evolution = cma.CMAEvolutionStrategy(space.start, sigma, options)
    found: list[Candidate] = []
    for generation in range(generations):
        vectors = [[float(x) for x in vector] for vector in evolution.ask()]
        asked = [Candidate(stage, generation, number, vector, WORST) for number, vector in enumerate(vectors)]
        measured = _measured(asked, evaluate, memory, workers)
        losses = [c.loss for c in measured]
        if generation == 0:
            _check_differing(losses)
        found += measured
        progress(len(found))
        evolution.tell(vectors, losses)
        if evolution.stop():
            break
    return min(found, key=lambda c: c.loss)


def _measured(
    asked: Sequence[Candidate], evaluate: Evaluate, memory: Memory, workers: int
) -> list[Candidate]:
    """The candidates with their losses: the known ones, and the others, as many at a time as there are workers."""
    known = {c.number: loss for c in asked if (loss := memory.find(c)) is not None}
    unknown = [c for c in asked if c.number not in known]
    for begin in range(0, len(unknown), workers):
        now = unknown[begin : begin + workers]
        for c, loss in zip(now, evaluate([c.vector for c in now]), strict=True):
            known[c.number] = loss if math.isfinite(loss) else WORST
            memory.add(replace(c, loss=known[c.number]))
    return [replace(c, loss=known[c.number]) for c in asked]


def one_a_worker(evaluate: Callable[[Sequence[float]], float]) -> Evaluate:
    """Candidates at the same time: of the data-parallel ranks each measures one, as if it were alone.

    Args:
        evaluate: one candidate's loss; ranks of other groups than the data-parallel one take part together.
    """

    def together(vectors: Sequence[list[float]]) -> list[float]:
        own, loss = parallel.dp_rank(), WORST
        with parallel.apart("dp"):
            if own < len(vectors):
                loss = evaluate(vectors[own])
        losses = parallel.gather_objects(loss, "dp")
        return parallel.broadcast_object(losses)[: len(vectors)]

    return together


def _check_differing(losses: Sequence[float]) -> None:
    if min(losses) == max(losses):
        raise InputError(
            f"evolve.fitness: all {len(losses)} candidates of the first generation have the loss {losses[0]:g}: there "
            "is nothing to go by; take another fitness, more samples, or models that differ"
        )


def reference(name: str, memory: Memory, measure: Callable[[], float]) -> float:
    """A loss that is remembered by name alone, of a model that the result is compared with."""
    wanted = Candidate(name, REFERENCE, 0, [], WORST)
    known = memory.find(wanted)
    if known is None:
        known = float(measure())
        memory.add(replace(wanted, loss=known))
    return known
