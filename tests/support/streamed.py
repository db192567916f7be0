"""Work that is done from file to file or a layer at a time, to compare with what a model in memory makes of it."""

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoints.families import config_of
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.checkpoints.tensor_files import TensorFiles
from nemo_minitron.export.huggingface import SHARD_BYTES, write_directory
from nemo_minitron.pruning.streamed import PrunedWeights


def streamed(source: Path, plan: Any, output: Path) -> dict[str, bytes]:
    """The files of the student, by name.

    Args:
        source: a Hugging Face directory.
        output: where they are written; made.
    """
    found = find_source(source)
    output.mkdir()
    write_directory(
        PrunedWeights(plan, TensorFiles(source, found.architecture, "source").read),
        config_of(plan.target, found.seq_length),
        found.tokenizer,
        getattr(torch, found.dtype),
        output,
        SHARD_BYTES,
    )
    return contents(output)


def contents(directory: Path) -> dict[str, bytes]:
    """Its files' bytes by name."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


class Killed(BaseException):
    """Ends a run as a signal does: nothing is tidied up."""


def pruned(overrides: list[str], killed_at: int | None = None) -> dict[str, Any] | None:
    """The work of recipes/prune.py in this process; see `_worked`."""
    return _worked("prune", overrides, killed_at)


PER_SHARD = 3


def cached(
    overrides: list[str],
    killed_at: int | None = None,
    *,
    killed_in: int | None = None,
    guesses: bool = True,
) -> dict[str, Any] | None:
    """The work of recipes/cache_teacher.py in this process, with `PER_SHARD` sequences a shard; see `_worked`.

    Args:
        killed_in: the number of the shard whose writing ends it.
        guesses: whether a teacher may have random weights.

    Returns:
        As `_worked`, with "tokens" int64 [n, s] of all sequences.
    """
    from nemo_minitron.distillation.cache.writer import CachePlan
    from nemo_minitron.workflows import teacher_loss
    from nemo_minitron.workflows.cache_teacher import check as checks
    from nemo_minitron.workflows.cache_teacher.run import _sequences

    plan, write = checks._plan, CachePlan.write_shard

    def writing(self: Any, number: int, *what: Any) -> Any:
        if number == killed_in:
            raise Killed
        return write(self, number, *what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_plan", lambda *of: replace(plan(*of), per_shard=PER_SHARD))
        patch.setattr(CachePlan, "write_shard", writing)
        if guesses:
            patch.setattr(teacher_loss, "BETTER_THAN_A_GUESS", -torch.inf)
        result = _worked("cache_teacher", overrides, killed_at)
        if result is not None:
            sequence = _sequences(*check("cache_teacher", overrides))
            result["tokens"] = torch.stack([sequence(n) for n in range(result["sequences"])])
        return result


def _worked(recipe: str, overrides: list[str], killed_at: int | None) -> dict[str, Any] | None:
    """The work of a recipe.

    Args:
        killed_at: how many layers are loaded one by one before it is killed.

    Returns:
        What goes to result.json; None if it was killed.
    """
    from nemo_minitron.workflows.one_layer import OneLayer
    from tests.support.ranks import layout
    from tests.support.sessions import _launched

    load, loaded = OneLayer._load, itertools.count()

    def loading(self: Any, number: int) -> None:
        if next(loaded) == killed_at:
            raise Killed
        load(self, number)

    layout(1, 1)
    with _launched(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLayer, "_load", loading)
        r, prepared = check(recipe, overrides)
        Path(r.run_dir).mkdir(parents=True, exist_ok=True)
        run = importlib.import_module(f"nemo_minitron.workflows.{recipe}.run").run
        try:
            return run(r, prepared, Path(r.run_dir))
        except Killed:
            return None


def check(recipe: str, overrides: list[str]) -> tuple[Any, Any]:
    """The settings, and what a recipe makes of them before it works."""
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config import recipes
    from nemo_minitron.run.main import register_resolvers
    from tests.support.ranks import ROOT

    schema = {"prune": recipes.PruneRecipe, "cache_teacher": recipes.CacheTeacherRecipe}[recipe]
    register_resolvers(recipe)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        r: Any = recipes.parse(schema, compose(recipe, overrides=overrides))
    return r, importlib.import_module(f"nemo_minitron.workflows.{recipe}.check").check(r)
