"""Plans which units of a model stay, and makes a sharded Megatron model smaller by such a plan."""

from collections.abc import Sequence
from typing import Any

from nemo_minitron.pruning.choose import make_plan
from nemo_minitron.pruning.iterative import compose, step_targets
from nemo_minitron.pruning.plan import Kept, PrunePlan
from nemo_minitron.pruning.ranking import explicit_layers
from nemo_minitron.pruning.target import check_target, resolve_target

__all__ = [
    "Kept",
    "PrunePlan",
    "check_target",
    "compose",
    "explicit_layers",
    "make_plan",
    "prune",
    "resolve_target",
    "step_targets",
]


def prune(chunks: Sequence[Any], plan: PrunePlan) -> None:
    """Carry out a plan on a sharded model, in place; see `nemo_minitron.pruning.model.prune`."""
    from nemo_minitron.pruning.model import prune as carry_out  # imports Megatron; plans are made without

    carry_out(chunks, plan)
