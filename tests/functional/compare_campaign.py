"""recipes/compare.py killed between two models, and its tables: `make test-full` runs it, CI does not.

python -m pytest tests/functional/compare_campaign.py
"""

import csv
import shutil

import pytest

from tests.functional.conftest import Pruned
from tests.support.commands import SEQ_LENGTH, Commands
from tests.support.other_families import GEMMA_2, make_model, own_questions


def test_killed_between_two_models_it_goes_on_with_the_second(commands: Commands, pruned: Pruned) -> None:
    """A Megatron checkpoint beside a family that is not converted; the table is then made of the two runs alone."""
    home = commands.home / "killed-compare"
    home.mkdir()
    make_model(home / "gemma2", GEMMA_2)
    questions = own_questions(home / "own.jsonl")
    run_dir = home / "run"
    asked = [
        *commands.data(),
        f"models=[{pruned.run_dir},{home / 'gemma2'}]",
        f"eval.tasks=[{questions}]",
        "eval.samples=8",
        "compare.rounds=1",
        f"compare.prompt_tokens={SEQ_LENGTH // 2}",
        "compare.new_tokens=6",
        f"run_dir={run_dir}",
    ]
    commands.killed("compare", *asked, log=home / "log", when=lambda said: "2/2 gemma2: is evaluated" in said)
    ended = commands.run("compare", *asked)
    result = ended.result()
    assert f"1/2 {pruned.run_dir.name}: evaluated before" in ended.stderr
    # Of two tokenizers: bits a byte is compared, perplexity is the baseline's alone.
    assert "gemma2: its tokens are not" in ended.stderr
    first, second = (result["models"][name] for name in (pruned.run_dir.name, "gemma2"))
    assert first["measures"]["LM loss, nats a token"]["value"] == pytest.approx(
        pruned.result["lm_loss_nats_after"],
        rel=0.2,  # of 8 sequences, not 32
    )
    assert set(first["measures"]) - set(second["measures"]) == {
        "LM loss, nats a token",
        "perplexity",
        "token accuracy",
    }
    assert first["parameters"] == pruned.result["params_after"]
    own = second["measures"]["own, acc_norm"]
    assert own["items"] == 6
    assert own["difference"]["items"] == 6
    for found in (first, second):
        assert found["decoded tokens/s"] > 1
        assert 0 < found["time to first token, s"] < 30
        assert found["weights, bytes"] > 1e5
    page = (run_dir / "compare.md").read_text()
    assert "| function calling | not run |" in page
    assert (run_dir / "compare.png").read_bytes().startswith(b"\x89PNG")
    # The same table out of the two evaluations, which are not made again; the second model is gone by then.
    shutil.rmtree(home / "gemma2")
    runs = [run_dir / "evaluations" / name for name in (pruned.run_dir.name, "gemma2")]
    again = commands.run(
        "compare",
        *commands.data(),
        f"models=[{runs[0]},{runs[1]}]",
        "compare.speed=false",
        "compare.baseline=gemma2",
        f"run_dir={home / 'again'}",
    )
    assert "is evaluated" not in again.stderr
    assert (
        again.result()["models"][pruned.run_dir.name]["measures"]["own, acc_norm"]["value"]
        == (first["measures"]["own, acc_norm"]["value"])
    )
    with open(home / "again" / "compare.csv") as file:
        lines = list(csv.DictReader(file))
    (row,) = [line for line in lines if line["measure"] == "own, acc_norm" and line["difference"]]
    assert row["model"] == pruned.run_dir.name
    assert float(row["difference"]) == pytest.approx(-own["difference"]["value"])
