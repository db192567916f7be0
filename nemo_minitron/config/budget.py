"""`data.tokens`: a budget of tokens in the place of steps or samples."""

from dataclasses import is_dataclass
from typing import Any

from nemo_minitron.errors import InputError


def settle_tokens(recipe: Any) -> None:
    """Let `data.tokens`, where it is given, say how many steps a recipe trains or how many samples it calibrates on.

    `distill.max_steps`, `trainer.max_steps` or `prune.calibration_samples` become what the budget is enough for.

    Args:
        recipe: a parsed one.

    Raises:
        InputError: less than one step; a recipe that reads no training text of `data`.
    """
    d = recipe.data
    if d.tokens is None:
        return
    group, key, batch = _place(recipe)
    if group is None:
        raise InputError(
            f"data.tokens={d.tokens}: only pretrain, prune, search, distill, cache_teacher and correct_teacher have a "
            "budget of tokens; must be null here"
        )
    if d.tokens < batch * d.seq_length:
        step = f"{batch} x " if batch > 1 else ""
        raise InputError(
            f"data.tokens={d.tokens}: must be at least {batch * d.seq_length}, {step}data.seq_length {d.seq_length}"
        )
    setattr(group, key, d.tokens // (batch * d.seq_length))


def _place(recipe: Any) -> tuple[Any, str, int]:
    """The group and the key of a recipe that count what it reads of the train split, and sequences in one of it."""
    # Groups that a recipe has no schema for are there too, as plain values.
    own = {name for name in ("prune", "distill", "model") if is_dataclass(getattr(recipe, name, None))}
    if "prune" in own:
        return recipe.prune, "calibration_samples", 1
    if "distill" in own:
        return recipe.distill, "max_steps", recipe.distill.global_batch_size
    if "model" in own:
        return recipe.trainer, "max_steps", recipe.trainer.global_batch_size
    return None, "", 1
