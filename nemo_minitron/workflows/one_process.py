"""What recipes have in common that work in one process."""

from typing import Any

from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.errors import InputError


class OneProcess:
    """What such a recipe's `check` returns: there are no ranks that would find it again."""

    def to_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def check_one_process(t: TrainerConfig, recipe: str, so: str = "") -> None:
    """Refuse a layout of several ranks.

    Args:
        recipe: its name.
        so: what follows, such as ", whatever layout the source had".

    Raises:
        InputError: there is one.
    """
    if t.ranks > 1:
        raise InputError(f"{t.ranks} ranks: {recipe} works in one process{so}")
