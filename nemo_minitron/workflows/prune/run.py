"""The work of `recipes/prune.py`: load, score, plan, prune, measure before and after, save; or all of it streamed."""

import importlib
from pathlib import Path
from typing import Any

from nemo_minitron.config.recipes import PruneRecipe


def run(r: PruneRecipe, prepared: Any, directory: Path) -> dict[str, Any]:
    """Prune a model in memory, or with `stream=true` from file to file.

    Args:
        prepared: by `check`.

    Returns:
        The fields of `result.json`.
    """
    # NeMo's imports take seconds and most of the memory that a streamed pruning may have.
    work = importlib.import_module(f"{__package__}.{'streamed' if r.stream else 'in_memory'}")
    return dict(work.run(r, prepared, directory))
