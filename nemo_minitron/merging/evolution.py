"""CMA-ES over a space, remembered candidate by candidate: a search that was killed goes on where it was.

The search itself is the package cma's. It is seeded and everything runs in order, so that every rank, and a run that
goes on, asks for the same candidates: known ones are answered from what was written down.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.files import read_steps, write_text
from nemo_minitron.merging.spaces import Space, population_of

# In place of a loss that is no number: worse than all others, and cma takes only finite ones.
WORST = 1e9


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

    def find(self, stage: str, generation: int, number: int, vector: Sequence[float]) -> float | None:
        """A remembered loss; None for another vector in its place."""
        found = self.known.get((stage, generation, number))
        same = found is not None and np.allclose(found.vector, vector, rtol=0, atol=1e-9)
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
    if find_spec("cma") is None:
        raise InputError(
            "evolve: needs the package cma (make setup EXTRAS=dev,search,device,evaluation,merge)"
        )


def check_size(space: Space, why: str) -> None:
    """Refuse a space of less than two numbers, which CMA-ES does not search.

    Raises:
        InputError: names the setting.
    """
    if len(space.names) < 2:
        raise InputError(f"{why}: leaves {len(space.names)} number to search for; CMA-ES needs at least 2")


def search(
    stage: str,
    space: Space,
    evaluate: Callable[[Sequence[float]], float],
    memory: Memory,
    *,
    generations: int,
    population: int | None,
    sigma: float,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Candidate:
    """The best candidate of `generations` times `population`.

    Args:
        evaluate: a candidate's loss; less is better; the same on every rank.
        seed: of what is drawn.
        progress: told how many candidates are measured.

    Raises:
        InputError: all candidates of the first generation have the same loss.
    """
    import cma

    size = population or population_of(len(space.names))
    options = {
        "bounds": [0, 1],
        "popsize": size,
        "seed": seed + 1,  # 0 would be the clock
        "randn": np.random.RandomState(seed % 2**32).randn,
        "verbose": -9,
    }
    evolution = cma.CMAEvolutionStrategy(space.start, sigma, options)
    found: list[Candidate] = []
    for generation in range(generations):
        vectors = [[float(x) for x in vector] for vector in evolution.ask()]
        for number, vector in enumerate(vectors):
            found.append(_measured(stage, generation, number, vector, evaluate, memory))
            progress(len(found))
        losses = [c.loss for c in found[-size:]]
        if generation == 0 and min(losses) == max(losses):
            raise InputError(
                f"evolve.fitness: all {size} candidates of the first generation have the loss {losses[0]:g}: there is "
                "nothing to go by; take another fitness, more samples, or models that differ"
            )
        evolution.tell(vectors, losses)
        if evolution.stop():
            break
    return min(found, key=lambda c: c.loss)


def _measured(
    stage: str,
    generation: int,
    number: int,
    vector: list[float],
    evaluate: Callable[[Sequence[float]], float],
    memory: Memory,
) -> Candidate:
    known = memory.find(stage, generation, number, vector)
    if known is not None:
        return Candidate(stage, generation, number, vector, known)
    loss = evaluate(vector)
    candidate = Candidate(stage, generation, number, vector, loss if math.isfinite(loss) else WORST)
    memory.add(candidate)
    return candidate


def reference(name: str, memory: Memory, measure: Callable[[], float]) -> float:
    """A loss that is remembered by name alone, of a model that the result is compared with."""
    known = memory.find(name, -1, 0, [])
    if known is not None:
        return known
    loss: Any = measure()
    memory.add(Candidate(name, -1, 0, [], float(loss)))
    return float(loss)
