"""What benchmarks are made of: sides that take turns, the plan for a GPU, the wheels that it needs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import in_turn
from benchmarks.gpu import pack, plan
from nemo_minitron.config.recipes import parse
from nemo_minitron.run.main import register_resolvers
from tests.unit.test_config import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
MODEL, OUT = Path("/models/m.gguf"), Path("/tmp/not-made/out")
STEPS = plan.steps(MODEL, OUT)
SIDE = """
from benchmarks import in_turn
count = iter(range(100))
in_turn.before_models()
in_turn.serve(lambda: {factor} * next(count), 0)
"""


def test_sides_take_turns() -> None:
    """Each counts its runs; the first, the warm-up, is not asked for, and what else a side prints is no answer."""
    sides = {
        name: in_turn.Side([sys.executable, "-c", "print('hello')" + SIDE.format(factor=factor)])
        for name, factor in (("ours", 1), ("other", 10))
    }
    found = in_turn.compare(sides, runs=3)
    assert (found["value_ours"], found["value_other"], found["runs"]) == (2, 20, 3)
    assert found["wall_s_ratio"] > 0
    assert all(side.process.returncode == 0 for side in sides.values())


def test_a_side_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match=r"-c 1/0 ended with exit code 1"):
        in_turn.Side([sys.executable, "-c", "1/0"])


def test_the_plan_fits_half_an_hour_and_its_parts_ten_minutes() -> None:
    assert sum(step.limit_s for step in STEPS) <= 1800
    assert max(step.limit_s for step in STEPS) <= 600
    assert len({step.name for step in STEPS}) == len(STEPS)
    listed = subprocess.run(
        [
            sys.executable,
            "benchmarks/gpu/plan.py",
            "--model",
            MODEL,
            "--out",
            OUT,
            "--list",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(f"{step.name} ({step.limit_s} s): " in listed for step in STEPS)
    assert not OUT.exists()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_takes_its_arguments(step: plan.Step, tmp_path: Path) -> None:
    script, *arguments = step.arguments
    if script == "-c":
        compile(arguments[0], "-c", "exec")
        return
    assert (ROOT / script).is_file()
    folder, name = script.removesuffix(".py").split("/")
    if folder == "benchmarks":
        importlib.import_module(f"benchmarks.{name}").arguments().parse_args(arguments)
        return
    register_resolvers(name, SCHEMAS[name])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        recipe = parse(SCHEMAS[name], compose(name, arguments))
    assert recipe.run_dir.startswith(str(OUT))


def test_a_plan_goes_on_after_a_step_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        plan.Step("broken", 60, ["-c", "raise SystemExit(3)"]),
        plan.Step("late", 1, ["-c", "import time; time.sleep(30)"]),
        plan.Step("good", 60, ["-c", "print('noise'); print('{\"a\": 1}')"]),
        plan.Step("left_out", 6000, ["-c", "1/0"]),
    ]
    monkeypatch.setattr(plan, "steps", lambda *_: made)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "m", "--out", str(tmp_path)])
    assert plan.main() == 1
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["exit_code"] for line in lines] == [3, 124, 0, None]
    assert json.loads(lines[2]["last_line"]) == {"a": 1}


def test_every_wheel_is_pinned_and_each_piece_can_be_transferred() -> None:
    commands = pack.commands(Path("d"))
    assert len(commands) == len(pack.NAMES) == len(set(map(pack.plain, pack.NAMES)))
    assert all(command[-1].count("==") == 1 and "--no-deps" in command for command in commands)
    assert "megatron-core==0.13.1" in [command[-1] for command in commands]
    sizes = {Path(str(size)): size for size in (18, 16, 10, 7, 4, 3, 2, 50)}
    pieces = pack.pieces(sizes, 44)
    assert sorted(file for piece in pieces for file in piece) == sorted(sizes)
    assert [sum(sizes[file] for file in piece) for piece in pieces] == [50, 44, 16]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["forward", "train", "distill"])
def test_both_sides_of_a_step_do_the_same(work: str) -> None:
    """Losses (mean logits of a forward pass) of Megatron with our layers and loss are those of transformers."""
    sizes = ["--layers", "2", "--vocab-size", "512", "--tokens", "64", "--batch", "2", "--runs", "2"]
    ended = subprocess.run(
        [sys.executable, "benchmarks/steps.py", work, *sizes], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    line = json.loads(ended.stdout.splitlines()[-1])
    assert line["value_ours"] == pytest.approx(line["value_transformers"], rel=1e-4)
