"""Learning rate and warm-up by the size of what learns, where a configuration leaves them open (null).

Between the sizes of a table the rate goes on a line of their logarithms, and beyond its ends it stays.
"""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.errors import InputError

OPEN = ("lr", "min_lr", "warmup_steps")
# Models up to this size are the demo's and its students, whose rates are those that README's figures were made with.
_SMALL = 4_000_000


@dataclass(frozen=True)
class Rule:
    """Of one way of training.

    Attributes:
        rates: (parameters, learning rate), smallest first.
        warmup: the most steps of a small model, which takes a fifth of all, and of others, which take a tenth.
    """

    rates: tuple[tuple[float, float], ...]
    warmup: tuple[int, int]

    def rate(self, parameters: int) -> float:
        """In two digits."""
        (first, rate), *rest = self.rates
        if is_small(parameters):
            return rate
        for size, next_rate in rest:
            if parameters < size:
                share = math.log(parameters / first) / math.log(size / first)
                return float(f"{rate * (next_rate / rate) ** share:.2g}")
            first, rate = size, next_rate
        return rate

    def warmup_steps(self, parameters: int, steps: int) -> int:
        """Of a training of so many steps: a short one, too, has to reach its learning rate."""
        small, other = self.warmup
        return min(small, max(steps // 5, 1)) if is_small(parameters) else min(other, max(steps // 10, 1))


# The last of `distill` and `correction` are those of Llama-3.1-Minitron-4B and its teacher (arXiv 2408.11796). How it
# was aligned was not published: the last of the others are customary, not measured. That of 81.4M is the rate
# of the runs on the 135M; docs/distillation.md, "Learning rates".
RULES = {
    "distill": Rule(((3.64e6, 1e-3), (81.4e6, 6e-4), (4.51e9, 1e-4)), (20, 40)),
    "correction": Rule(((3.64e6, 6e-4), (8.03e9, 6e-5)), (20, 120)),
    "sft": Rule(((3.64e6, 1e-3), (4.51e9, 2e-5)), (20, 40)),
    "preference": Rule(((3.64e6, 1e-4), (4.51e9, 1e-6)), (20, 40)),
    "lora": Rule(((3.64e6, 1e-2), (4.51e9, 2e-4)), (20, 40)),
}


def is_small(parameters: int) -> bool:
    """Whether a model learns as the demo always did, of which nothing needs to be said."""
    return parameters <= _SMALL


def settle(o: Any, key: str, parameters: int, steps: int) -> str | None:
    """Give an `OptimConfig` the values that it leaves open, in place, by the table that it names.

    `min_lr` is a tenth of `lr`; of a small model a tenth of the table's rate, whatever `lr` is.

    Args:
        key: what the configuration calls it, such as "distill.optim".
        parameters: of what learns.
        steps: of the training.

    Returns:
        What was chosen, in words; None where everything was given.

    Raises:
        InputError: an open value and no table; a `min_lr` above `lr`.
    """
    open_ = [name for name in OPEN if getattr(o, name) is None]
    if open_ and o.by_size is None:
        raise InputError(
            f"{key}.{open_[0]}=null: must be a number where {key}.by_size=null; else that names a table"
        )
    if open_:
        rule = RULES[o.by_size]
        rate = rule.rate(parameters)
        o.lr = rate if o.lr is None else o.lr
        if o.min_lr is None:
            o.min_lr = float(f"{(rate if is_small(parameters) else o.lr) / 10:.6g}")
        if o.warmup_steps is None:
            o.warmup_steps = rule.warmup_steps(parameters, steps)
    check_decay(o, key)
    chosen = ", ".join(f"{key}.{name}={getattr(o, name):g}" for name in open_)
    return f"{chosen}: by the size of what learns, {parameters / 1e6:,.1f}M parameters" if open_ else None


def check_decay(o: Any, key: str) -> None:
    """Refuse a rate that would rise; what is open is settled later.

    Raises:
        InputError: names both.
    """
    if None not in (o.lr, o.min_lr) and o.min_lr > o.lr:
        raise InputError(f"{key}.lr={o.lr}, {key}.min_lr={o.min_lr}: the second must be at most the first")


def check_given(o: Any, key: str) -> None:
    """Refuse open values of a training that no table is for.

    Raises:
        InputError: names the key.
    """
    for name in OPEN:
        if getattr(o, name) is None:
            raise InputError(f"{key}.{name}=null: must be a number")
    if o.by_size is not None:
        raise InputError(f"{key}.by_size={o.by_size}: pretraining has no table; must be null")


def keep(config: DictConfig, recipe: Any) -> None:
    """Write what was settled into the configuration that the run keeps, in place of null."""
    for group in ("distill", "align"):
        settled, kept = getattr(getattr(recipe, group, None), "optim", None), f"{group}.optim"
        if settled is None or OmegaConf.select(config, kept) is None:
            continue
        for name in OPEN:
            value = getattr(settled, name)
            if value is not None and OmegaConf.select(config, f"{kept}.{name}") is None:
                OmegaConf.update(config, f"{kept}.{name}", value)
