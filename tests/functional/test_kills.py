"""Recipes that SIGKILL ends at bad moments, and are then run again in the same run directory."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import Commands

pytestmark = pytest.mark.slow

STEPS, SAVED_EVERY = 40, 10
STEP = re.compile(r"global_step=(\d+)[\d.]*, reduced_train_loss=([\d.]+)")


def losses(output: str) -> dict[int, float]:
    """By step, as the progress line shows them: four digits."""
    return {int(step): float(loss) for step, loss in STEP.findall(output)}


def digests(directory: Path, pattern: str = "*") -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob(pattern)}


def test_a_killed_training_goes_on_as_if_nothing_had_happened(commands: Commands) -> None:
    """Killed three times: while it writes the first checkpoint, between two and while it writes another. Each step's
    loss shows that the data's order, the schedule and the optimizer came back; the final weights are the same to the
    last bit."""
    own = [
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={SAVED_EVERY}",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
    ]
    straight = commands.pretrain(commands.home / "straight", *own, f"export_dir={commands.home}/straight-hf")
    expected = losses(straight.stdout)
    assert sorted(expected) == list(range(STEPS))

    run_dir, export = commands.home / "killed", commands.home / "killed-hf"
    overrides = [*commands.pretraining(run_dir), *own, f"export_dir={export}"]
    saved = run_dir / "nemo" / "checkpoints"

    def writing() -> bool:
        return any(saved.glob("*-unfinished"))

    first_one = commands.killed(
        "pretrain", *overrides, log=commands.home / "first-one.log", when=lambda seen: writing()
    )
    assert writing()
    between = commands.killed(
        "pretrain",
        *overrides,
        log=commands.home / "between.log",
        when=lambda seen: max(losses(seen), default=0) >= SAVED_EVERY + 2,
    )
    assert not (run_dir / "result.json").exists()
    first = {path: path.stat().st_mtime_ns for path in saved.glob("*-last/weights/*")}
    assert first

    during = commands.killed(
        "pretrain",
        *overrides,
        log=commands.home / "during.log",
        when=lambda seen: max(losses(seen), default=0) >= 2 * SAVED_EVERY - 1 and writing(),
    )
    assert writing()
    assert not (run_dir / "result.json").exists()
    # As if it had been killed before it knew that the newer checkpoint is good, and so had kept the older.
    (newer,) = (p for p in saved.glob("*-last") if not p.with_name(f"{p.name}-unfinished").exists())
    older = shutil.copytree(newer, saved / "step=4-last")
    # The clock was set back meanwhile. This one cannot be loaded.
    (older / "weights" / "common.pt").write_bytes(b"")
    os.utime(older, (2**31, 2**31))

    ended = commands.run("pretrain", *overrides)
    result = ended.result()
    assert [p.name for p in saved.glob("*-last*")] == [f"step={STEPS - 1}-last"]
    # However often it was started.
    assert not list((run_dir / "nemo").glob("run_*"))
    runs = [losses(said) for said in (first_one, between, during, ended.stdout)]
    for run in runs:
        assert run == {step: expected[step] for step in run}
    assert set().union(*runs) == set(expected)
    assert min(runs[1]) == 0
    # The others did not begin anew.
    assert min(runs[2]) >= SAVED_EVERY
    assert min(runs[3]) >= SAVED_EVERY
    assert result["lm_loss_nats"] == straight.result()["lm_loss_nats"]
    weights = [digests(directory, "*.safetensors") for directory in (export, commands.home / "straight-hf")]
    assert weights[0] == weights[1]
    assert weights[0]


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a pruning run leaves, but for how long it took and where."""
    result = json.loads((run_dir / "result.json").read_text())
    for measured in ("wall_s", "peak_rss_gib", "checkpoint", "control_lm_loss_nats", "beats_all_controls"):
        result.pop(measured, None)
    plan = json.loads((run_dir / "plan.json").read_text())
    files = digests(run_dir, "scores.safetensors") | digests(run_dir / "checkpoint" / "weights", "*.distcp")
    return {"result": result, "plan": plan, "files": files}


def test_a_killed_pruning_is_redone(commands: Commands, teacher: Teacher, pruned: Pruned) -> None:
    """One run directory: killed while scoring, while saving, and after saving but before it was done."""
    run_dir = commands.home / "killed-pruning"
    overrides = [*commands.pruning(teacher.huggingface, run_dir), "prune.control_seeds=1"]
    temporary, checkpoint = run_dir / ".checkpoint.tmp", run_dir / "checkpoint"

    def killed(name: str, when: Any) -> None:
        commands.killed("prune", *overrides, log=commands.home / f"{name}.log", when=when)
        assert not (run_dir / "result.json").exists()

    killed("scoring", lambda seen: "scoring:" in seen)
    assert not (run_dir / "plan.json").exists()
    assert not temporary.exists()

    killed("saving", lambda seen: temporary.exists())
    assert (run_dir / "plan.json").exists()
    assert not checkpoint.exists()

    killed("saved", lambda seen: checkpoint.exists())
    assert not temporary.exists()
    refused = commands.run("prune", *commands.pruning(run_dir, commands.home / "of-killed"))
    assert refused.code == 2
    assert "did not finish" in refused.stderr

    commands.run("prune", *overrides).result()
    assert outcome(run_dir) == outcome(pruned.run_dir)
    assert not list(run_dir.glob(".checkpoint*"))


def test_a_killed_streamed_pruning_goes_on_at_its_file(commands: Commands, teacher: Teacher) -> None:
    run_dir, straight = commands.home / "killed-stream", commands.home / "straight-stream"
    asked = ["+conf=width", f"source={teacher.huggingface}", "stream=true", "prune.importance=random"]
    asked.append("shard_size=1KB")
    commands.run("prune", *asked, f"run_dir={straight}").result()
    unfinished = run_dir / ".checkpoint.tmp"

    def files() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in unfinished.glob("*.safetensors")}

    log = commands.home / "killed-stream.log"
    commands.killed("prune", *asked, f"run_dir={run_dir}", log=log, when=lambda seen: len(files()) > 2)
    there = files()
    assert not (run_dir / "checkpoint").exists()
    result = commands.run("prune", *asked, f"run_dir={run_dir}").result()
    assert result["weight_files_kept"] == len(there) < result["weight_files"]
    final = {file.name: file.stat().st_mtime_ns for file in (run_dir / "checkpoint").iterdir()}
    assert there.items() <= final.items()
    assert digests(run_dir / "checkpoint") == digests(straight / "checkpoint")
