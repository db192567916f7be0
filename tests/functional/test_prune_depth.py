"""Layers by what the model loses without them, and pruning in steps, as a user types it."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nemo_minitron.arch import Architecture
from tests.functional.conftest import Teacher
from tests.functional.test_prune import saved_elements
from tests.support.commands import SIZES, VOCAB_SIZE, Commands, Ended, tree

SOURCE = Architecture(**SIZES, vocab_size=VOCAB_SIZE, model_type="llama")
QUESTIONS = [
    {"question": "import", "choices": ["os", "))))", "42 42"], "answer": 0},
    {"question": "def __init__(self", "choices": ["class", ", value): pass"], "answer": ", value): pass"},
    {"question": "for x in", "choices": ["] ] ]", "range(10):"], "answer": 1},
    {"question": "return", "choices": ["None", "def def"], "answer": 0},
    {"question": "if x is not", "choices": ["None:", "import:"], "answer": 0},
]


def prune(commands: Commands, teacher: Teacher, run_dir: Path, *overrides: str) -> Ended:
    common = [*commands.data(), "prune.calibration_samples=16", f"source={teacher.run_dir}"]
    return commands.run("prune", *common, f"run_dir={run_dir}", *overrides)


def questions(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([*map(json.dumps, QUESTIONS), *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def by_loss(commands: Commands, teacher: Teacher) -> Path:
    run_dir = commands.home / "by-loss"
    metric = ["prune.drop_layers=null", "prune.layer_metric=lm_loss"]
    prune(commands, teacher, run_dir, "+conf=depth", *metric).result()
    return run_dir


def test_depth_by_lm_loss(by_loss: Path) -> None:
    run_dir, result = by_loss, json.loads((by_loss / "result.json").read_text())
    plan = json.loads((run_dir / "plan.json").read_text())
    assert result["params_after"] == SOURCE.replace(num_layers=2).parameters()
    scores = load_file(str(run_dir / "scores.safetensors"))["layers/lm_loss"]
    assert plan["kept"]["layers"] == sorted(scores.topk(2).indices.tolist())
    assert plan["scores"]["layer_metric"] == "lm_loss"
    # On other text, the loss without a layer is in the region of the whole model's.
    assert result["lm_loss_nats_before"] - 1 < float(scores.min()) < float(scores.max()) < 10
    assert "task_accuracy_before" not in result


def test_width_and_depth_by_a_task_in_two_steps(commands: Commands, teacher: Teacher) -> None:
    run_dir, path = commands.home / "by-task", questions(commands.home / "task.jsonl")
    (run_dir).mkdir()
    (run_dir / "scores-3.safetensors").write_bytes(b"of an earlier run")
    ended = prune(
        commands,
        teacher,
        run_dir,
        "prune=depth",
        "prune.num_layers=2",
        "prune.ffn_hidden_size=64",
        "prune.layer_metric=task",
        f"prune.task_file={path}",
        "prune.task_normalize=true",
        "prune.iterations=2",
    )
    result, plan = ended.result(), json.loads((run_dir / "plan.json").read_text())
    target = SOURCE.replace(num_layers=2, ffn_hidden_size=64)
    assert result["params_after"] == target.parameters() == saved_elements(run_dir / "checkpoint")
    assert (result["task_questions"], result["prune_iterations"]) == (5, 2)
    for name in ("task_accuracy_before", "task_accuracy_after"):
        assert result[name] in [right / 5 for right in range(6)]
    steps = [{"num_layers": 3, "ffn_hidden_size": 96}, {"num_layers": 2, "ffn_hidden_size": 64}]
    assert plan["scores"]["steps"] == steps
    found = sorted(p.name for p in run_dir.glob("scores*.safetensors"))
    assert found == ["scores-2.safetensors", "scores.safetensors"]
    # The second step's indices are those of what the first has left: composed by hand, they are the plan's.
    first, second = (load_file(str(run_dir / name)) for name in reversed(found))
    left = [i for i in range(4) if i != int(first["layers/task"].argmin())]
    assert second["ffn_hidden_size"].shape == (3, 96)
    kept = [i for i in range(3) if i != int(second["layers/task"].argmin())]
    assert plan["kept"]["layers"] == [left[i] for i in kept]
    for row, layer in zip(plan["kept"]["ffn_hidden_size"], kept, strict=True):
        units = first["ffn_hidden_size"][left[layer]].topk(96).indices.sort().values
        best = second["ffn_hidden_size"][layer].topk(64).indices.sort().values
        assert row == units[best].tolist()


REFUSED = {
    "a task without a file": (["prune.layer_metric=task"], "needs the questions, prune.task_file="),
    "a bad line": (["prune.task_file={bad}"], r"bad.jsonl, line 6: key 'question' is missing"),
    "too long": (["prune.task_file={long}"], r"long.jsonl, line 6: choice 0 makes \d+ tokens .* has 64"),
    "steps and scores": (
        ["prune.iterations=2", "prune.scores={scores}"],
        r"prune.iterations=2: .* prune.scores=",
    ),
    "steps of a block": (
        ["prune.iterations=2", "prune.contiguous=true"],
        "prune.iterations=2: .*contiguous=true",
    ),
    "steps with a residual": (
        ["prune.iterations=2", "prune.head_residual=true"],
        "prune.iterations=2: .*head_residual=true",
    ),
    "no step": (["prune.iterations=0"], "iterations=0: must be at least 1"),
    "too many steps": (["prune.iterations=3"], "iterations=3: step 2 would change no size"),
    "layers that may not go": (["prune.protect_first=3"], "protect_first=3 .* leave 1 of 4"),
    "a residual of nothing": (["prune.head_residual=true"], "head_residual: no query group loses heads"),
    "scores without the metric": (
        ["prune.scores={scores}", "prune.layer_metric=task"],
        "hold no 'layers/task'; they hold",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, refused: dict[str, dict]) -> None:
    answer = refused[name]
    assert (answer["code"], answer["nemo"]) == (2, False), answer
    (line,) = answer["err"].splitlines()
    assert re.search(REFUSED[name][1], line), line


@pytest.fixture(scope="module")
def refused(commands: Commands, teacher: Teacher, by_loss: Path) -> dict[str, dict]:
    home = commands.home / "bad-tasks"
    home.mkdir()
    too_long = {**QUESTIONS[0], "question": "x y " * 40}
    places = {
        "bad": questions(home / "bad.jsonl", '{"choices": ["a", "b"], "answer": 0}'),
        "long": questions(home / "long.jsonl", json.dumps(too_long)),
        "scores": by_loss / "scores.safetensors",
    }
    common = [*commands.data(), f"source={teacher.run_dir}", "prune=depth", "prune.num_layers=2"]
    asked = []
    for number, (overrides, _) in enumerate(REFUSED.values()):
        made = [override.format(**places) for override in overrides]
        run_dir = home / f"run{number}"
        asked.append({"recipe": "prune", "overrides": [*common, f"run_dir={run_dir}", *made], "env": {}})
    answers = commands.ask(asked)
    assert all(tree(run_dir) == {} for run_dir in home.glob("run*"))
    return dict(zip(REFUSED, answers, strict=True))
