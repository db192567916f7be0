"""The launcher's ranks agree with one process."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import Commands


def assert_same(run_dir: Path, result: dict[str, Any], other_dir: Path, other: dict[str, Any]) -> None:
    """Scores and losses to 1e-4, kept indices identical."""
    for name in ("lm_loss_nats_before", "lm_loss_nats_after"):
        assert math.isclose(result[name], other[name], rel_tol=1e-4), name
    ours, theirs = (load_file(str(d / "scores.safetensors")) for d in (run_dir, other_dir))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    plans = [json.loads((d / "plan.json").read_text()) for d in (run_dir, other_dir)]
    assert plans[0]["kept"] == plans[1]["kept"]
    assert result["params_after"] == other["params_after"]


def test_two_tensor_parallel_ranks(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    run_dir = commands.home / "tp2"
    result = commands.prune(
        teacher.huggingface,
        run_dir,
        "trainer.tensor_model_parallel_size=2",
        nproc=2,
        env={"NEMO_MINITRON_PRODUCTS": "onednn"},
    ).result()
    assert (result["ranks"], result["tensor_model_parallel_size"]) == (2, 2)
    assert_same(run_dir, result, pruned.run_dir, pruned.result)
    # Other products than the one process's: the record says so, and the ranks took it.
    assert result["cpu_products"].startswith("float32 by onednn")
    assert json.loads((run_dir / "cpu_products.json").read_text())["float32"] == "onednn"
