"""Which architectures lie inside a budget: candidates for a search, from a grid of sizes."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.axes import AXES, PRUNABLE
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.target import check_target, resolve_target

_LARGEST_GRID = 1_000_000
METRICS = ("parameters", "non_embedding_parameters", "flops_per_token", "memory_bytes")


@dataclass(frozen=True)
class Workload:
    """What FLOPs and memory are counted for: a context of so many tokens, so many sequences, bytes per value."""

    context: int
    sequences: int = 1
    bytes_per_value: int = 2

    def costs(self, a: Architecture) -> dict[str, int]:
        """Every metric of `METRICS`: counts, FLOPs of a forward pass per token, bytes of weights and keys/values."""
        cache = a.key_value_cache_values(self.context) * self.sequences
        return {
            "parameters": a.parameters(),
            "non_embedding_parameters": a.non_embedding_parameters(),
            "flops_per_token": a.flops_per_token(self.context),
            "memory_bytes": (a.parameters() + cache) * self.bytes_per_value,
        }


@dataclass(frozen=True)
class Budget:
    """Upper limits by metric; a candidate must use at least 1 - slack of one of them, so that toys do not compete."""

    limits: Mapping[str, float]
    slack: float

    def use(self, costs: Mapping[str, float]) -> float:
        """The largest share of a limit that these costs take; above 1 they are over the budget."""
        return max(costs[metric] / limit for metric, limit in self.limits.items())

    def holds(self, costs: Mapping[str, float]) -> bool:
        """Whether the costs are inside."""
        return 1 - self.slack <= self.use(costs) <= 1


@dataclass(frozen=True)
class Candidate:
    """One architecture to try, with what it costs."""

    architecture: Architecture
    costs: Mapping[str, int]

    @property
    def name(self) -> str:
        """A readable key, unique among the prunings of one source: sizes of the axes in Megatron's order."""
        a = self.architecture
        return "-".join([f"l{a.num_layers}", *(f"{axis.letter}{axis.size(a)}" for axis in AXES)])


def make_budget(source: Architecture, limits: Mapping[str, Any], slack: float, load: Workload) -> Budget:
    """A budget from limits as a user writes them.

    Args:
        source: the model to prune.
        limits: by metric, an absolute number, or a fraction of the source's ("1/2" or 0.5), or None.
        slack: share of a limit that may stay unused.
        load: what FLOPs and memory are counted for.

    Raises:
        InputError: no limit, an unknown metric, a value that is no positive number or fraction.
    """
    if not 0 < slack <= 1:
        raise InputError(f"search.slack={slack}: must be above 0 and at most 1")
    given = {metric: value for metric, value in limits.items() if value is not None}
    if unknown := sorted(set(given) - set(METRICS)):
        raise InputError(f"search.budget.{unknown[0]}: unknown; known are {', '.join(METRICS)}")
    if not given:
        raise InputError(f"search.budget: set one of {', '.join(METRICS)}")
    own = load.costs(source)
    return Budget({metric: _limit(metric, value, own[metric]) for metric, value in given.items()}, slack)


def _limit(metric: str, value: Any, own: int) -> float:
    try:
        if isinstance(value, str) and "/" in value:
            above, below = value.split("/")
            number = own * float(above) / float(below)
        else:
            number = float(value) * (own if float(value) < 1 else 1)
    except (ValueError, TypeError, ZeroDivisionError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise InputError(
            f"search.budget.{metric}={value}: must be a positive number, or a fraction of the source's {own} as 1/2 or "
            "0.5"
        )
    return number


def check_grid(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The grid's axes and choices.

    Raises:
        InputError: an unknown axis, an axis without choices, a grid too large to enumerate.
    """
    checked = {}
    for axis, values in grid.items():
        if axis not in PRUNABLE:
            raise InputError(
                f"search.grid.{axis}: no axis that can be pruned; those are {', '.join(PRUNABLE)}"
            )
        if values is None:
            continue
        if not isinstance(values, list) or not values:
            raise InputError(
                f"search.grid.{axis}={values}: must be a list of sizes or fractions, such as [3/4,1/2]"
            )
        checked[axis] = values
    if not checked:
        raise InputError(f"search.grid: give sizes to choose from for one of {', '.join(PRUNABLE)}")
    if (size := math.prod(len(values) for values in checked.values())) > _LARGEST_GRID:
        raise InputError(f"search.grid: {size:,} combinations; at most {_LARGEST_GRID:,} are enumerated")
    return checked


def candidates(
    source: Architecture,
    grid: Mapping[str, Sequence[Any]],
    budget: Budget,
    load: Workload,
    *,
    tp: int = 1,
    pp: int = 1,
) -> list[Candidate]:
    """The legal points of a grid inside a budget, those that use most of it first; the order is deterministic.

    Args:
        source: the model to prune.
        grid: as `check_grid` gives it; an axis that it leaves out keeps the source's size.
        budget: see `make_budget`.
        load: what FLOPs and memory are counted for.
        tp, pp: the layout that each candidate must fit.

    Raises:
        InputError: no point is legal (with the last reason) or none is inside (with the nearest on both sides).
    """
    legal, reason = _legal(source, grid, load, tp, pp)
    if not legal:
        raise InputError(f"search.grid: no combination is legal; the last: {reason}")
    inside = [c for c in legal if budget.holds(c.costs)]
    if not inside:
        raise InputError(_none_inside(legal, budget))
    return sorted(inside, key=lambda c: (-budget.use(c.costs), c.name))


def _legal(
    source: Architecture, grid: Mapping[str, Sequence[Any]], load: Workload, tp: int, pp: int
) -> tuple[list[Candidate], str]:
    found: dict[Architecture, Candidate] = {}
    reason = ""
    for sizes in points(grid):
        try:
            target = resolve_target(source, sizes)
            check_target(source, target, tp=tp, pp=pp)
        except InputError as error:
            reason = str(error)
            continue
        if target != source:
            found.setdefault(target, Candidate(target, load.costs(target)))
        else:
            reason = "all sizes are the source's"
    return list(found.values()), reason


def points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the grid's sizes."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _none_inside(legal: Sequence[Candidate], budget: Budget) -> str:
    uses = [(budget.use(c.costs), c.name) for c in legal]
    below = max((u for u in uses if u[0] < 1 - budget.slack), default=None)
    above = min((u for u in uses if u[0] > 1), default=None)
    nearest = ", ".join(f"{name} uses {use:.0%}" for use, name in filter(None, (below, above)))
    limits = ", ".join(f"{metric}={limit:.4g}" for metric, limit in budget.limits.items())
    return (
        f"search.budget {limits} with slack {budget.slack:g}: no candidate is inside; the nearest: {nearest}"
    )


Evaluate = Callable[[Candidate], float]


def search_grid(found: Sequence[Candidate], evaluate: Evaluate) -> dict[str, float]:
    """Losses by candidate name, in nats, of all of them."""
    return {candidate.name: evaluate(candidate) for candidate in found}


def search_optuna(
    source: Architecture,
    grid: Mapping[str, Sequence[Any]],
    found: Sequence[Candidate],
    evaluate: Evaluate,
    trials: int,
    seed: int,
) -> dict[str, float]:
    """Losses by candidate name of those that Optuna's TPE sampler asks for.

    The sampler is seeded and everything runs in order, so that every rank, and a run that goes on after it was killed,
    asks for the same candidates: finished ones are answered from what `evaluate` remembers.

    Args:
        source, grid, found: what `candidates` took and gave; points outside `found` are trials that cost nothing.
        evaluate: a candidate's loss in nats, the same on every rank.
        trials: distinct candidates to evaluate, at most.
        seed: of the sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction="minimize")
    inside = {c.architecture: c for c in found}
    losses: dict[str, float] = {}
    for _ in range(50 * trials + len(inside)):
        if len(losses) >= min(trials, len(inside)):
            break
        trial = study.ask()
        sizes = {
            axis: values[trial.suggest_categorical(axis, list(range(len(values))))]
            for axis, values in grid.items()
        }
        candidate = _inside(source, sizes, inside)
        if candidate is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        if candidate.name not in losses:
            losses[candidate.name] = evaluate(candidate)
        study.tell(trial, losses[candidate.name])
    return losses


def _inside(
    source: Architecture, sizes: Mapping[str, Any], inside: Mapping[Architecture, Candidate]
) -> Candidate | None:
    try:
        return inside.get(resolve_target(source, sizes))
    except InputError:
        return None
