"""A plan carried out from file to file, to compare with what a model in memory makes of it."""

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
    """The work of recipes/prune.py in this process.

    Args:
        killed_at: the layer that ends it, of those that are loaded one by one.

    Returns:
        What goes to result.json; None if it was killed.
    """
    from nemo_minitron.workflows.one_layer import OneLayer
    from nemo_minitron.workflows.prune.run import run
    from tests.support.ranks import layout
    from tests.support.sessions import _launched

    load = OneLayer._load

    def loading(self: Any, number: int) -> None:
        if number == killed_at:
            raise Killed
        load(self, number)

    layout(1, 1)
    with _launched(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLayer, "_load", loading)
        r, prepared = check(overrides)
        Path(r.run_dir).mkdir(parents=True, exist_ok=True)
        try:
            return run(r, prepared, Path(r.run_dir))
        except Killed:
            return None


def check(overrides: list[str]) -> tuple[Any, Any]:
    """The settings, and what recipes/prune.py makes of them before it works."""
    from hydra import compose, initialize_config_dir

    from nemo_minitron.config.recipes import PruneRecipe, parse
    from nemo_minitron.run.main import register_resolvers
    from nemo_minitron.workflows.prune.check import check
    from tests.support.ranks import ROOT

    register_resolvers("prune")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        r = parse(PruneRecipe, compose("prune", overrides=overrides))
    return r, check(r)
