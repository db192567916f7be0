"""recipes/search.py as a user types it: killed after a candidate, it goes on and gives what prune.py gives."""

import csv
import json
import math
from pathlib import Path

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import Commands
from tests.support.kill_trials import unmeasured


@pytest.mark.slow
def test_a_killed_search_goes_on_and_its_best_is_what_prune_makes(
    commands: Commands, teacher: Teacher, pruned: Pruned
) -> None:
    run_dir = commands.home / "searched"
    overrides = [
        *commands.data(),
        "prune.calibration_samples=32",
        f"source={teacher.huggingface}",
        f"run_dir={run_dir}",
        "prune=width",
        "search.budget.parameters=0.72/1",
        "search.slack=0.4",
        "search.grid={hidden_size:[48,32],ffn_hidden_size:[80,48],num_attention_heads:null,num_layers:null}",
        "search.distill_steps=2",
        "search.distill_candidates=1",
        "distill.optim.warmup_steps=1",
        "distill.limit_val_batches=1",
    ]
    tried = run_dir / "candidates"
    commands.killed(
        "search",
        *overrides,
        log=commands.home / "search.log",
        when=lambda _: len(list(tried.glob("l4*.json"))) >= 1,
    )
    assert not (run_dir / "result.json").exists()
    first = {path: path.stat().st_mtime_ns for path in tried.glob("*.json")}
    result = commands.run("search", *overrides).result()
    assert first
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a finished one was redone"
    rows = list(csv.DictReader((run_dir / "search.csv").open()))
    losses = [float(row["lm_loss_nats"]) for row in rows[1:]]
    assert [int(row["rank_pruned"]) for row in rows[1:]] == [sorted(losses).index(n) + 1 for n in losses]
    # The best after pruning was distilled and leads; the others follow as they were.
    assert losses == sorted(losses)
    assert float(rows[1]["lm_loss_nats_distilled"]) < losses[0]
    assert {row["lm_loss_nats_distilled"] for row in rows[2:]} == {""}
    assert len(losses) == result["candidates_tried"] > result["candidates_distilled"] == 1
    entries = {path.stem: json.loads(path.read_text()) for path in tried.glob("l4*.json")}
    # The same sizes, scores and data as the pruning that another test looks at.
    same = entries["l4-h48-f80-a8-g4"]["lm_loss_nats"]
    assert math.isclose(same, pruned.result["lm_loss_nats_after"], rel_tol=1e-6)
    best = result["best"]
    assert result["lm_loss_nats_distilled"] == min(
        entry["lm_loss_nats"] for name, entry in entries.items() if name.endswith(".distilled")
    )
    assert result["lm_loss_nats_after"] == entries[best]["lm_loss_nats"]
    assert not list(tried.glob("*/nemo")), "weights of what was only measured stay on the disk"
    assert (run_dir / "search.png").read_bytes().startswith(b"\x89PNG")
    assert Path(result["checkpoint"], "weights").is_dir()
    assert (
        json.loads((run_dir / "plan.json").read_text())["target"]["hidden_size"]
        == result["best_sizes"]["hidden_size"]
    )


@pytest.mark.slow
def test_a_candidate_killed_while_it_learns_ends_where_distill_does(
    commands: Commands, teacher: Teacher, pruned: Pruned
) -> None:
    """Both candidates; the second one's training is killed between two checkpoints, and the first is not redone.

    They learn from float32 weights, as they were measured, and are measured again in the dtype that was asked for.
    """
    run_dir, alone = commands.home / "searched-distilling", commands.home / "distilled-as-candidate"
    schedule = ["distill.optim.warmup_steps=1", "distill.limit_val_batches=2", "distill.val_check_interval=2"]
    schedule += ["trainer.checkpoint_dtype=bfloat16"]
    overrides = [
        *commands.data(),
        *schedule,
        "prune.calibration_samples=32",
        f"source={teacher.huggingface}",
        f"run_dir={run_dir}",
        "prune=width",
        "search.budget.parameters=0.72/1",
        "search.slack=0.4",
        "search.grid={hidden_size:[48],ffn_hidden_size:[80,48],num_attention_heads:null,num_layers:null}",
        "search.distill_steps=6",
    ]
    tried = run_dir / "candidates"

    def learning(_: str) -> bool:
        logs = {path: path.read_text().count('"train"') for path in tried.glob("*/steps.jsonl")}
        return len(logs) == 2 and min(logs.values()) >= 3 and any(tried.glob("*/nemo/checkpoints/*-last"))

    commands.killed("search", *overrides, log=commands.home / "learning.log", when=learning)
    (first,) = tried.glob("*.distilled.json")
    done = first.stat().st_mtime_ns
    result = commands.run("search", *overrides).result()
    assert first.stat().st_mtime_ns == done, "a finished one was redone"
    assert result["candidates_distilled"] == result["candidates_tried"] == 2

    run = commands.run(
        "distill",
        *commands.data(),
        *schedule,
        f"student={pruned.run_dir}",
        f"teacher={teacher.huggingface}",
        f"run_dir={alone}",
        "distill.max_steps=6",
    ).result()
    entry = json.loads((tried / "l4-h48-f80-a8-g4.distilled.json").read_text())
    assert math.isclose(entry["lm_loss_nats"], run["lm_loss_nats_after"], rel_tol=1e-6)
    (log,) = tried.glob("l4-h48-f80-a8-g4-*/steps.jsonl")
    ours, theirs = ([unmeasured(x) for x in p.read_text().splitlines()] for p in (log, alone / "steps.jsonl"))
    for one, other in zip(ours, theirs, strict=True):
        assert one["split"] == other["split"]
        assert all(math.isclose(one[k], other[k], rel_tol=1e-5) for k in one if k != "split")
