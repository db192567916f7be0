"""The presets' scores, kept units, losses and students are one process's under every layout.

The work of recipes/prune.py runs in the kept ranks, which saves each layout half a minute of imports; one is started by
the launcher as well.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.conftest import Pruned, Teacher
from tests.functional.test_prune_ranks import assert_same
from tests.support import ranks, sessions
from tests.support.commands import SEQ_LENGTH, VOCAB_SIZE, Commands

pytestmark = pytest.mark.slow
PATIENCE_S = 240
PRESETS = ["width", "depth"]
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, {"data_parallel_size": 2, "global_batch_size": 16}),
    "tp2-sp": (2, {**TP2, "sequence_parallel": True}),
    "tp2-pp2": (4, {**TP2, **PP2}),
}


def overrides(commands: Commands, teacher: Teacher, preset: str, run_dir: Path) -> list[str]:
    """As `Commands.prune` for any preset; the source is the NeMo 2 run."""
    usual = [*commands.pruning(teacher.run_dir, run_dir), f"data.cache_dir={commands.cache}"]
    return [f"+conf={preset}", *(part for part in usual if not part.startswith("+conf="))]


def prune(
    commands: Commands, teacher: Teacher, preset: str, name: str, *more: str
) -> tuple[Path, dict[str, Any]]:
    run_dir = commands.home / "-".join([preset, name, *more]).replace("=", "_")
    count, sizes = LAYOUTS.get(name, (1, {}))
    made = [*overrides(commands, teacher, preset, run_dir), *more]
    return run_dir, ranks.run_on_ranks(count, sessions.pruned_under, made, sizes, timeout=PATIENCE_S)[0]


@pytest.fixture(scope="module")
def alone(commands: Commands, teacher: Teacher) -> dict[str, tuple[Path, dict[str, Any]]]:
    """One process, by preset."""
    return {preset: prune(commands, teacher, preset, "alone") for preset in PRESETS}


def student_loss(run_dir: Path) -> float:
    """Loss in nats of the saved student, opened by one process."""
    tokens = torch.randint(VOCAB_SIZE, (4, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(4))
    checkpoint = str(run_dir / "checkpoint")
    return ranks.run_on_ranks(1, sessions.loss_under, checkpoint, tokens, {}, timeout=PATIENCE_S)[0]


def test_the_kept_ranks_do_what_the_recipe_does(alone: dict[str, Any], pruned: Pruned) -> None:
    assert_same(*alone["width"], pruned.run_dir, pruned.result)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_agrees_with_one_process(
    commands: Commands, teacher: Teacher, alone: dict[str, Any], preset: str, name: str
) -> None:
    run_dir, result = prune(commands, teacher, preset, name)
    assert result["ranks"] == LAYOUTS[name][0]
    assert_same(run_dir, result, *alone[preset])
    assert math.isclose(student_loss(run_dir), student_loss(alone[preset][0]), rel_tol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_control_is_the_same_under_every_layout(
    commands: Commands, teacher: Teacher, iterations: int
) -> None:
    control = ["prune.importance=random", "prune.seed=5", f"prune.iterations={iterations}"]
    (run_dir, result), *others = (
        prune(commands, teacher, "width", name, *control) for name in ("alone", *LAYOUTS)
    )
    kept = json.loads((run_dir / "plan.json").read_text())["kept"]
    for other, found in others:
        assert json.loads((other / "plan.json").read_text())["kept"] == kept
        assert math.isclose(found["lm_loss_nats_after"], result["lm_loss_nats_after"], rel_tol=1e-4)


def test_the_launcher_with_two_stages(commands: Commands, teacher: Teacher, alone: dict[str, Any]) -> None:
    """Two tensor-parallel ranks: test_prune_ranks.py."""
    run_dir = commands.home / "launched"
    made = overrides(commands, teacher, "depth", run_dir)
    result = commands.run("prune", *made, "trainer.pipeline_model_parallel_size=2", nproc=2).result()
    assert_same(run_dir, result, *alone["depth"])
