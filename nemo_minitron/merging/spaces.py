"""What a search may change, as numbers from 0 to 1: the numbers of a merge, or the way through the models' layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.path import Path, Slot
from nemo_minitron.merging.settings import STEPS, Merge, Setting, number

# A mean of models whose weights are all 0 is none.
_LEAST_WEIGHT = 1e-6
_KEPT, _LEFT_OUT = 0.75, 0.25


class Space(Protocol):
    """Numbers from 0 to 1, by name."""

    @property
    def names(self) -> list[str]:
        """Of each number."""

    @property
    def start(self) -> list[float]:
        """Where the search begins."""


@dataclass(frozen=True)
class Parameters:
    """The numbers of a merge: of each model, a weight and a density (or one t) for each group of layers.

    Attributes:
        merge: the merge whose numbers are changed.
        groups: of layers; embeddings go with the first, what comes after the layers with the last.
        largest_weight: that a weight of 1 stands for.
    """

    merge: Merge
    groups: int = 1
    largest_weight: float = 1.0

    @property
    def names(self) -> list[str]:
        """Such as `weight 0.2`: of the first model and the third group."""
        uses = METHODS[self.merge.method].uses
        if "t" in uses:
            return [f"t {group}" for group in range(self.groups)]
        models = range(len(self.merge.models))
        return [f"{use} {model}.{group}" for use in uses for model in models for group in range(self.groups)]

    @property
    def start(self) -> list[float]:
        """The middle (arXiv 2403.13187, section 4.1)."""
        return [0.5] * len(self.names)

    def merge_of(self, vector: Sequence[float]) -> Merge:
        """The merge with the numbers of a vector."""
        found = dict(zip(self.names, map(float, vector), strict=True))
        if "t" in METHODS[self.merge.method].uses:
            return replace(self.merge, t=self._setting(found, "t ", 1.0))
        models = range(len(self.merge.models))
        weights = tuple(
            self._setting(found, f"weight {m}.", self.largest_weight, _LEAST_WEIGHT) for m in models
        )
        if "density" not in METHODS[self.merge.method].uses:
            return replace(self.merge, weights=weights)
        densities = tuple(self._setting(found, f"density {m}.", 1.0) for m in models)
        return replace(self.merge, weights=weights, densities=densities)

    def _setting(self, found: dict[str, float], prefix: str, largest: float, least: float = 0.0) -> Setting:
        values = [max(least, found[f"{prefix}{group}"] * largest) for group in range(self.groups)]
        return number(*values, spread=STEPS)


@dataclass(frozen=True)
class Layers:
    """Which layers of the models follow each other: all of them laid out in sequence `repeats` times, an indicator for
    each place, and scales.

    Attributes:
        layers: how many each model has.
        scales: "none", "slots" (one for each place) or "pairs" (W_ij for layer j after layer i).
        reach: scales go from 1 - reach to 1 + reach.
    """

    layers: tuple[int, ...]
    repeats: int = 1
    scales: str = "slots"
    reach: float = 0.5

    @property
    def _places(self) -> list[tuple[int, int]]:
        """(model, layer) of each place."""
        once = [(model, layer) for model, count in enumerate(self.layers) for layer in range(count)]
        return once * self.repeats

    @property
    def names(self) -> list[str]:
        """Such as `keep 1:4` and `scale 1:4`, with the repeat after them, or `scale 0:3>1:4`."""
        once = sum(self.layers)
        of = [
            f"{m}:{layer}{f'#{i // once}' if i >= once else ''}" for i, (m, layer) in enumerate(self._places)
        ]
        scales = {"none": [], "slots": [f"scale {name}" for name in of]}.get(self.scales)
        if scales is None:
            scales = [f"scale {before}>{after}" for before in of[:once] for after in of[:once]]
        return [*(f"keep {name}" for name in of), *scales]

    @property
    def start(self) -> list[float]:
        """The first model as it is."""
        first = [_KEPT if index < self.layers[0] else _LEFT_OUT for index in range(len(self._places))]
        return first + [0.5] * (len(self.names) - len(first))

    def path_of(self, vector: Sequence[float]) -> Path:
        """The path that a vector stands for: places above one half are kept."""
        places = self._places
        kept = [index for index in range(len(places)) if vector[index] > 0.5]
        slots, before = [], None
        for index in kept:
            slots.append(Slot(*places[index], self._scale(vector, before, index)))
            before = index
        return tuple(slots)

    def _scale(self, vector: Sequence[float], before: int | None, index: int) -> float:
        count, once = len(self._places), sum(self.layers)
        if self.scales == "slots":
            at = count + index
        elif self.scales == "pairs" and before is not None:
            at = count + (before % once) * once + index % once
        else:
            return 1.0
        # Rounded, so that a path is read back as it was written.
        return round(1 + self.reach * (2 * float(vector[at]) - 1), 6)


def population_of(size: int) -> int:
    """CMA-ES's own (Hansen 2016, arXiv 1604.00772, equation 48)."""
    return 4 + math.floor(3 * math.log(size))
