"""recipes/compare.py as a user types it: refused in a line, and the tables of a family that is not converted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import SEQ_LENGTH, Commands
from tests.support.other_families import GEMMA_2, make_model, own_questions


def finished(home: Path, name: str, **result: Any) -> Path:
    directory = home / name
    directory.mkdir()
    (directory / "result.json").write_text(json.dumps({"recipe": "evaluate", "scores": [], **result}))
    return directory


def test_what_cannot_be_compared_is_refused_in_a_line(commands: Commands) -> None:
    home = commands.home / "refused-models"
    home.mkdir()
    make_model(home / "gemma2", GEMMA_2)
    make_model(home / "broken", GEMMA_2)
    (home / "broken" / "model.safetensors").unlink()
    run = finished(home, "run", source="/nowhere")
    moved = finished(home, "changed", source=str(home / "gemma2"), source_sha256="0" * 64)
    begun = home / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("# python recipes/evaluate.py source=x\n")
    bad = home / "bad.jsonl"
    bad.write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{"question": "q"}\n')
    g = home / "gemma2"
    cases: dict[str, tuple[list[str], str]] = {
        "none": (["models=[]"], "models=[]: must name at least one"),
        "twice": ([f"models=[{run},{home}/./run]"], f"models={home}/./run: is there twice"),
        "missing": ([f"models=[{run},{home}/gone]"], f"models={home}/gone: no such file"),
        "unfinished": ([f"models=[{run},{begun}]"], f"models={begun}: this evaluation did not finish"),
        "changed": ([f"models=[{moved}]"], "has other weights now"),
        "no weights": ([f"models=[{home}/broken]"], f"models={home}/broken: model.safetensors is missing"),
        "baseline": (
            [f"models=[{run}]", "compare.baseline=other"],
            "compare.baseline=other: is not among models",
        ),
        "names": ([f"models=[{run}]", "compare.names=[a,b]"], "has 2 names for 1 models"),
        "odd name": ([f"models=[{run}]", "compare.names=[../x]"], "compare.names=../x"),
        "no chat template": ([f"models=[{g}]", "eval.tasks=[ifeval_541]"], f"models={g}: has no chat"),
        "bad question": ([f"models=[{g}]", f"eval.tasks=[{bad}]"], "bad.jsonl, line 2"),
        "limit of no task": (
            [f"models=[{g}]", "eval.limits={x:1}"],
            "eval.limits=x: is not among eval.tasks",
        ),
        "long prompt": ([f"models=[{g}]", "compare.prompt_tokens=250"], "compare.prompt_tokens=250"),
        "ranks": ([f"models=[{g}]", "trainer.tensor_model_parallel_size=2"], "2"),
    }
    data = [*commands.data(), "eval.samples=2"]
    asked = [
        {"recipe": "compare", "overrides": [*data, *given, f"run_dir={home / 'out' / name}"], "env": {}}
        for name, (given, _) in cases.items()
    ]
    for (name, (_, part)), ended in zip(cases.items(), commands.ask(asked), strict=True):
        assert (ended["code"], ended["nemo"]) == (2, False), (name, ended)
        last = ended["err"].strip().splitlines()[-1]
        assert last.startswith("error: "), (name, ended)
        assert part in last, (name, last)
        assert not (home / "out" / name).exists(), name


@pytest.mark.slow
def test_a_family_that_is_not_converted(commands: Commands) -> None:
    """Evaluated and timed; then the same scores of its evaluation alone, which is not made again."""
    home = commands.home / "compared"
    home.mkdir()
    make_model(home / "gemma2", GEMMA_2)
    ended = commands.run(
        "compare",
        *commands.data(),
        f"models=[{home / 'gemma2'}]",
        f"eval.tasks=[{own_questions(home / 'own.jsonl')}]",
        "eval.samples=8",
        "compare.rounds=1",
        f"compare.prompt_tokens={SEQ_LENGTH // 2}",
        "compare.new_tokens=6",
        f"run_dir={home / 'run'}",
    )
    found = ended.result()["models"]["gemma2"]
    assert found["measures"]["own, acc_norm"]["items"] == 6
    assert found["decoded tokens/s"] > 1
    assert 0 < found["time to first token, s"] < 30
    assert found["weights, bytes"] > 1e5
    assert "| function calling | not run |" in (home / "run" / "compare.md").read_text()
    assert (home / "run" / "compare.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(home / "gemma2")
    evaluation = home / "run" / "evaluations" / "gemma2"
    again = commands.run("compare", *commands.data(), f"models=[{evaluation}]", f"run_dir={home / 'again'}")
    assert "is evaluated" not in again.stderr
    assert "its model is no longer at" in again.stderr
    assert again.result()["models"]["gemma2"]["measures"] == found["measures"]
