"""recipes/search.py as a user types it: killed after a candidate, it goes on and gives what prune.py gives."""

import csv
import json
import math
from pathlib import Path

from tests.functional.commands import Commands
from tests.functional.conftest import Pruned, Teacher


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
    ]
    tried = run_dir / "candidates"
    commands.killed(
        "search",
        *overrides,
        log=commands.home / "search.log",
        when=lambda _: len(list(tried.glob("l4*"))) >= 1,
    )
    assert not (run_dir / "result.json").exists()
    first = {path: path.stat().st_mtime_ns for path in tried.glob("*.json")}
    result = commands.run("search", *overrides).result()
    assert first
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a finished one was redone"
    rows = list(csv.DictReader((run_dir / "search.csv").open()))
    losses = [float(row["lm_loss_nats"]) for row in rows[1:]]
    assert losses == sorted(losses)
    assert len(losses) == result["candidates_tried"] > 1
    entries = {path.stem: json.loads(path.read_text()) for path in tried.glob("l4*.json")}
    # The same sizes, scores and data as the pruning that another test looks at.
    same = entries["l4-h48-f80-a8-g4"]["lm_loss_nats"]
    assert math.isclose(same, pruned.result["lm_loss_nats_after"], rel_tol=1e-6)
    assert result["lm_loss_nats_after"] == min(entry["lm_loss_nats"] for entry in entries.values())
    assert (run_dir / "search.png").read_bytes().startswith(b"\x89PNG")
    assert Path(result["checkpoint"], "weights").is_dir()
    assert (
        json.loads((run_dir / "plan.json").read_text())["target"]["hidden_size"]
        == result["best_sizes"]["hidden_size"]
    )
