"""recipes/evolve.py as a user types it: killed, it goes on to the same end; what it writes is what it measured."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.merging.methods import METHODS
from tests.functional.test_merge import missing, not_finite, other_tokenizer, with_config, with_tensor
from tests.support import merge_models
from tests.support.commands import Commands


@pytest.fixture(scope="module")
def models(commands: Commands) -> list[Path]:
    """A base and two models near it."""
    return merge_models.family(commands.home / "evolving", num_hidden_layers=2)


def arguments(commands: Commands, models: list[Path], *more: str) -> list[str]:
    base, *others = models
    kept = [f"models=[{','.join(map(str, others))}]", f"base={base}", "license=none", "eval.samples=4"]
    kept += ["evolve.samples=4", "evolve.generations=2", "evolve.population=5", *commands.data()]
    replaced = {item.partition("=")[0] for item in more}
    return [*(item for item in kept if item.partition("=")[0] not in replaced), *more]


def asked(recipe: str, overrides: list[str]) -> dict[str, Any]:
    return {"recipe": recipe, "overrides": overrides, "env": {}}


@pytest.mark.slow
def test_a_killed_search_ends_as_a_whole_one(commands: Commands, models: list[Path]) -> None:
    """Over both spaces, killed in the first; the loss of what is written is that of the candidate."""
    home, question = commands.home, commands.home / "question.jsonl"
    # A beginning of the other choice is the more probable one, whatever the model.
    question.write_text(json.dumps({"question": "a", "choices": ["b", "b c d"], "answer": 0}) + "\n")
    other = question.with_name("other.jsonl")
    other.write_text(question.read_text().replace('"a"', '"e"'))
    both = ["evolve.space=both", "eval.samples=4"]
    cut, whole = (arguments(commands, models, *both, f"run_dir={home}/{name}") for name in ("cut", "whole"))
    memory = home / "cut" / "candidates.jsonl"
    commands.killed(
        "evolve",
        *cut,
        log=home / "cut.log",
        # The line at the top, both losses of nine models, and some candidates.
        when=lambda _: memory.exists() and len(memory.read_text().splitlines()) > 21,
    )
    assert not (home / "cut" / "result.json").exists()
    before = memory.read_text().splitlines()
    measure = [*commands.data(), "eval.samples=4", f"source={home}/whole", f"run_dir={home}/measured"]
    same = ["evolve.fitness=task", f"evolve.task_file={question}", f"evolve.held_out_file={other}"]
    answers = commands.ask(
        [
            asked("evolve", cut),
            asked("evolve", whole),
            asked("evaluate", measure),
            asked("evolve", arguments(commands, models, *same, f"run_dir={home}/same")),
        ],
        "in_turn.py",
    )
    for answer in answers[:3]:
        assert answer["code"] == 0, answer["err"]
    results = [json.loads((home / name / "result.json").read_text()) for name in ("cut", "whole", "measured")]
    assert memory.read_text().splitlines()[: len(before) - 1] == before[:-1], "a known one was measured again"
    check_same(home / "cut", home / "whole", results)
    check_report(home / "whole", results[1])
    assert results[2]["lm_loss_nats"] == pytest.approx(results[1]["held_out_loss"], rel=1e-4)
    assert answers[3]["code"] == 2, answers[3]
    assert "all 5 candidates of the first generation have the loss" in answers[3]["err"].splitlines()[-1]


def check_same(cut: Path, whole: Path, results: list[dict[str, Any]]) -> None:
    one, two = (sorted((place / "candidates.jsonl").read_text().splitlines()) for place in (cut, whole))
    assert one == two
    for key in ("compared", "evolved", "best", "candidates_tried", "held_out_loss"):
        assert results[0][key] == results[1][key], key
    weights = [merge_models.weights_of(place / "checkpoint") for place in (cut, whole)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        np.testing.assert_array_equal(weights[0][name], weights[1][name])


def check_report(run: Path, result: dict[str, Any]) -> None:
    """The best of the table is what was written; transformers opens it, and the card holds the recipe."""
    from transformers import AutoModelForCausalLM

    untuned = [f"{name}, not tuned" for name in METHODS if name != "linear"]
    names = ["base (base)", "model0 (model 0)", "model1 (model 1)", "plain mean", *untuned]
    assert list(result["compared"]) == sorted(names)
    best, text = result["best"], (run / "evolve.csv").read_text()
    rows = [row for row in csv.reader(text.splitlines()) if row[0] == best]
    assert len(rows) == 10
    assert min(float(row[3]) for row in rows) == result["evolved"][best]["seen"]
    assert result["evolved"][best]["seen"] == min(one["seen"] for one in result["evolved"].values())
    assert result["candidates_tried"] == 20
    assert (run / "evolve.png").read_bytes().startswith(b"\x89PNG")
    model, found = AutoModelForCausalLM.from_pretrained(run / "checkpoint", output_loading_info=True)
    assert not any(found.values()), found
    path = result["evolved"]["layers"]["merge"]["parameters"]["path"]
    if best == "layers":
        count = sum(int(b) - int(a) + 1 for a, b in spans(path))
        assert model.config.num_hidden_layers == count
    card = (run / "checkpoint" / "README.md").read_text()
    assert "Found by CMA-ES over both" in card
    assert "merge_method: dare_ties" in card
    assert str(run.parent) not in card


def spans(path: str) -> list[tuple[str, str]]:
    pieces = [piece.partition("*")[0].partition(":")[2] for piece in path.split(",")]
    return [(piece.partition("-")[0], piece.partition("-")[2] or piece) for piece in pieces]


LAYERS = ["evolve.space=layers", "merge=linear", "base=null"]
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "density": (["merge.density=1.5"], ["merge.density", "1.5", "at most 1"]),
    "same": (["models=[{0},{0}]", "base={0}"], ["models", "same weights", "nothing to search"]),
    "one number": (["merge=slerp", "base=null"], ["merge.method=slerp", "evolve.groups=1", "at least 2"]),
    "no number": (["merge=model_stock"], ["merge.method=model_stock", "leaves 0 number"]),
    "path": (["merge=path", "base=null", "merge.path=0:0"], ["merge.method=path", "evolve.space=layers"]),
    "base": (["evolve.space=layers"], ["base=", "evolve.space=layers", "among the models"]),
    "no task": (["evolve.fitness=task"], ["evolve.fitness=task", "evolve.task_file=FILE"]),
    "no benchmark": (["evolve.fitness=benchmark"], ["evolve.benchmark=NAME"]),
    "fitness": (["evolve.fitness=luck"], ["evolve.fitness=luck", "lm_loss"]),
    "sigma": (["evolve.sigma=0"], ["evolve.sigma=0", "above 0"]),
    "source": (["source={0}"], ["evolve has no use for source", "models"]),
}


def test_refused(commands: Commands, models: list[Path]) -> None:
    """One line, exit code 2, before NeMo is imported and before anything is written."""
    places = commands.home / "bad-evolve"
    damages = {
        "NaN": (with_tensor(not_finite), ["not finite"], []),
        "missing": (with_tensor(missing), ["lack model.layers.1.mlp.up_proj.weight"], []),
        "tokenizer": (other_tokenizer, ["its tokenizer is another"], LAYERS),
        "rope": (with_config(rope_theta=5e5), ["rotary_base is 500000.0", "one architecture"], LAYERS),
    }
    cases = {}
    for name, (damage, says, more) in damages.items():
        shutil.copytree(models[2], places / name)
        damage(places / name)
        cases[name] = ([f"models=[{models[1]},{places / name}]", *more], says)
    merge_models.saved(merge_models.model(intermediate_size=48, num_hidden_layers=2), places / "wide")
    wide = [f"models=[{models[1]},{places / 'wide'}]", *LAYERS]
    cases["layers of another width"] = (wide, ["ffn_hidden_size is 48", "it is 40", "one architecture"])
    for name, (given, says) in SETTINGS.items():
        cases[name] = ([item.format(models[1]) for item in given], says)
    run = f"run_dir={commands.home}/bad-evolve-run"
    given = {name: (arguments(commands, models, *more, run), says) for name, (more, says) in cases.items()}
    commands.refuse("evolve", given)
