"""`recipes/plan_run.py` as a user types it; `benchmarks/plan_run.py` holds it against runs."""

from pathlib import Path

import pytest

from tests.support.commands import Commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_paper_s_runs_are_estimated(commands: Commands) -> None:
    """Llama-3.1-8B to 4B, from its config.json alone; 94B tokens, twice (arXiv 2408.11796)."""
    run_dir, source = commands.home / "planned", ROOT / "assets" / "llama-3.1-8b"
    asked = ["+conf=llama31_8b/minitron_width", f"source={source}", f"run_dir={run_dir}"]
    result = commands.run("plan_run", *asked, "plan.nodes=32", "plan.price_per_hour=2").result()
    rows = {row["step"]: row for row in result["steps_planned"]}
    assert rows["distill"]["params"] == pytest.approx(4.51e9, rel=0.01)
    for name in ("correct", "distill"):
        assert rows[name]["tokens"] == pytest.approx(94e9, rel=1e-3)
        assert 14 * 256 < rows[name]["gpu_hours"] < 30 * 256
    assert result["cost"] == pytest.approx(2 * result["gpu_hours"])
    page = (run_dir / "plan.md").read_text()
    assert page.startswith("# Estimated, not measured: 32 x 8 h100")
    assert "distill: layouts that fit, the fastest first" in page
    small = ["overwrite=true", "plan.gpu=l4", "plan.gpus_per_node=1"]
    refused = commands.run("plan_run", *asked, *small)
    assert refused.code == 2
    told = refused.stderr.splitlines()[-1]
    assert told.startswith("error: pipeline.steps.correct: nothing fits: needs at least ")
    assert (run_dir / "result.json").exists()


def test_a_pipeline_is_planned_step_by_step(commands: Commands) -> None:
    """Sizes go from step to step, and a step that does not fit is named."""
    off = ("correct", "preference", "answers", "evaluate", "export", "gguf", "device", "report")
    steps = [f"pipeline.steps.{name}.on=false" for name in off]
    done = commands.run("plan_run", *steps, "plan.gpus_per_node=1", "plan.gpu=l4")
    rows = {row["step"]: row for row in done.result()["steps_planned"]}
    assert list(rows) == ["prune", "distill", "sft"]
    # Of the student that is made: prune's own result.
    assert {row["params"] for row in rows.values()} == {2_066_832}
    assert "Estimated, not measured" in done.stderr
    small = commands.run("plan_run", *steps, "plan.gpus_per_node=1", "plan.gpu=l4", "plan.memory_gib=0.01")
    assert small.code == 2
    assert small.stderr.splitlines()[-1].startswith(
        "error: pipeline.steps.distill: nothing fits: needs at least"
    )
    beside = commands.run("plan_run", "distill.max_steps=3")
    assert beside.code == 2
    assert "distill.max_steps=3: belongs to one run; name it with plan.recipe" in beside.stderr
