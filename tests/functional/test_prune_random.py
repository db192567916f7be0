"""The control of the README, prune.importance=random, and a student that knows its teacher; NeMo is imported once."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.functional.test_prune import SOURCE, TARGET, saved_elements
from tests.support.commands import Commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(commands: Commands, teacher: Teacher, pruned: Pruned) -> dict[str, dict[str, Any]]:
    """By name, what in_turn.py says of each, with its run directory."""
    usual = [*commands.data(), f"source={teacher.huggingface}"]
    control = ["+conf=width", *usual, "prune.importance=random", "prune.seed=3"]
    steps = ["distill.max_steps=1", "distill.optim.warmup_steps=0", "distill.limit_val_batches=1"]
    asked = {
        "one step": ("prune", control),
        "two steps": ("prune", [*control, "prune.num_layers=2", "prune.iterations=2"]),
        "distilled": ("distill", [*commands.data(), f"student={pruned.run_dir}", *steps]),
        "streamed": ("prune", [*control, "stream=true"]),
        "exported": ("export", [f"source={commands.home}/random one step", "license=none"]),
        "distilled streamed": (
            "distill",
            [*commands.data(), f"student={commands.home}/random streamed", *steps],
        ),
    }
    cases = []
    for name, (recipe, overrides) in asked.items():
        run_dir = commands.home / f"random {name}"
        cases.append({"recipe": recipe, "overrides": [*overrides, f"run_dir={run_dir}"], "env": {}})
    answers = commands.ask(cases, script="in_turn.py")
    return {
        name: {**a, "run_dir": commands.home / f"random {name}"}
        for name, a in zip(asked, answers, strict=True)
    }


def result(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["code"] == 0, answer["err"]
    return json.loads(Path(answer["out"].splitlines()[-1]).read_text())


def plan_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "plan.json").read_text())


def test_units_at_random(runs: dict[str, dict[str, Any]], pruned: Pruned) -> None:
    run_dir, found = runs["one step"]["run_dir"], result(runs["one step"])
    assert (found["importance"], found["prune_seed"], found["calibration_samples"]) == ("random", 3, 0)
    assert found["params_after"] == TARGET.parameters() == saved_elements(run_dir / "checkpoint")
    kept, scored = plan_of(run_dir)["kept"], plan_of(pruned.run_dir)["kept"]
    assert len(kept["hidden_size"]) == 48
    assert kept["hidden_size"] == sorted(set(kept["hidden_size"]))
    assert kept["hidden_size"] != scored["hidden_size"]
    assert found["lm_loss_nats_after"] > pruned.result["lm_loss_nats_after"]
    assert not list(run_dir.glob("scores*"))
    assert not (run_dir / "importance.png").exists()
    closing = runs["one step"]["out"].splitlines()[-2]
    assert closing.startswith("prune: LM loss ")
    assert "hidden_size 48 of 64, ffn_hidden_size 80 of 128, ffn_hidden_size rounded from 82.29" in closing


def test_layers_at_random_in_two_steps(runs: dict[str, dict[str, Any]]) -> None:
    run_dir, found = runs["two steps"]["run_dir"], result(runs["two steps"])
    target = SOURCE.replace(num_layers=2, hidden_size=48, ffn_hidden_size=80)
    assert found["params_after"] == target.parameters() == saved_elements(run_dir / "checkpoint")
    plan = plan_of(run_dir)
    assert plan["scores"]["iterations"] == 2
    assert len(plan["kept"]["layers"]) == 2
    assert [len(set(row)) for row in plan["kept"]["ffn_hidden_size"]] == [80, 80]


def test_a_student_s_teacher_is_what_it_was_pruned_from(
    runs: dict[str, dict[str, Any]], teacher: Teacher
) -> None:
    found = result(runs["distilled"])
    assert found["teacher"] == str(teacher.huggingface.resolve())
    assert found["lm_loss_nats_teacher"] == pytest.approx(teacher.result["lm_loss_nats"], rel=1e-5)
    assert "teacher: LM loss" in runs["distilled"]["err"]


def test_streamed_it_is_the_same_student(runs: dict[str, dict[str, Any]], commands: Commands) -> None:
    """From file to file, as the pruning in memory and its export make it, byte for byte."""
    in_memory, found = result(runs["one step"]), result(runs["streamed"])
    run_dir = runs["streamed"]["run_dir"]
    assert plan_of(run_dir) == plan_of(runs["one step"]["run_dir"])
    for key in ("params_after", "source_sha256", "prune_seed", "kept", "rounded_from", "target"):
        assert found[key] == in_memory[key]
    exported = Path(result(runs["exported"])["exported"])
    names = [*exported.glob("*.safetensors"), exported / "config.json", exported / "tokenizer.json"]
    for file in names:
        assert file.read_bytes() == (run_dir / "checkpoint" / file.name).read_bytes()
    line = runs["streamed"]["out"].splitlines()[-2]
    assert line.startswith("prune: ")
    assert "hidden_size 48 of 64" in line
    assert result(runs["distilled streamed"])["lm_loss_nats_teacher"] > 0
