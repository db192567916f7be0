"""Every token of every training step counts, also where the tokenizer pads with the end of a document."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, SEQ_LENGTH, Commands
from tests.support.kill_trials import unmeasured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS, BATCH = 32, 8


@pytest.fixture(scope="module")
def padded(commands: Commands) -> Path:
    """The demo teacher as most fine-tunes are: its padding token is its end of text."""
    found = commands.home / "padded-teacher"
    shutil.copytree(ROOT / "assets" / "demo-teacher", found)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = found / name
        values = json.loads(path.read_text())
        values["pad_token"] = values["eos_token"]
        path.write_text(json.dumps(values))
    return found


@pytest.fixture(scope="module")
def short_documents(commands: Commands) -> list[str]:
    """A sequence of training has several of them, of some ten tokens each."""
    for name, count in (("short", 600), ("held-out", 300)):
        lines = (json.dumps({"text": f"{name} = {n} * {n + 1}\n"}) for n in range(count))
        (commands.home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = [f"data.train={commands.home}/short.jsonl", f"data.valid={commands.home}/held-out.jsonl"]
    return [*(o for o in commands.data() if not o.startswith(("data.train=", "data.valid="))), *files]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(unmeasured, (run_dir / "steps.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "train"]


def all_count(run_dir: Path, count: int = STEPS) -> None:
    assert [(s["step"], s["tokens"]) for s in steps(run_dir)] == [
        (n, BATCH * SEQ_LENGTH) for n in range(count)
    ]


def test_a_killed_distillation_counts_every_token(
    commands: Commands, padded: Path, short_documents: list[str]
) -> None:
    """The mask died within this many steps, and, since a resumed run began with a new one, losses differed then."""
    made = [
        "+conf=width",
        *short_documents,
        f"student={padded}",
        f"teacher={padded}",
        "distill.from_scratch=true",
        f"distill.max_steps={STEPS}",
        f"distill.global_batch_size={BATCH}",
        "distill.val_check_interval=12",
        "distill.limit_val_batches=1",
        "distill.optim.warmup_steps=1",
    ]
    straight, killed = commands.home / "counted", commands.home / "counted-killed"
    commands.run("distill", *made, f"run_dir={straight}").result()
    all_count(straight)
    log = killed / "steps.jsonl"
    commands.killed(
        "distill",
        *made,
        f"run_dir={killed}",
        log=commands.home / "counted-killed.log",
        when=lambda _: log.exists() and len(steps(killed)) >= 15,
    )
    assert not (killed / "result.json").exists()
    commands.run("distill", *made, f"run_dir={killed}").result()
    assert steps(killed) == steps(straight)


def test_next_tokens_alone_count_on_two_ranks(
    commands: Commands, padded: Path, short_documents: list[str]
) -> None:
    """Shared by data-parallel ranks, or on the last of two stages."""
    made = [*short_documents, f"teacher={padded}", f"distill.max_steps={STEPS}"]
    made += [
        f"distill.global_batch_size={BATCH}",
        "trainer.micro_batch_size=2",
        "distill.limit_val_batches=1",
    ]
    for name in ("data", "pipeline_model"):
        run_dir = commands.home / f"corrected-{name}"
        sizes = f"trainer.{name}_parallel_size=2"
        commands.run("correct_teacher", *made, sizes, f"run_dir={run_dir}", nproc=2).result()
        all_count(run_dir)


def test_a_token_that_does_not_count_ends_the_run(
    commands: Commands, padded: Path, short_documents: list[str]
) -> None:
    """With NeMo's data module as it comes."""
    fault = "import sys, runpy\nfrom nemo_minitron.nemo import trainer\ntrainer.never_padded = lambda module: module\n"
    run = "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    recipe, *made = commands.command("distill", *short_documents, f"student={padded}", f"teacher={padded}")[
        1:
    ]
    made += ["distill.loss=cross_entropy", "distill.max_steps=3", f"distill.global_batch_size={BATCH}"]
    run_dir = commands.home / "uncounted"
    done = subprocess.run(
        [sys.executable, "-c", fault + run, recipe, *made, f"run_dir={run_dir}"],
        env=commands.environment(PYTHONPATH=str(ROOT)),
        cwd=commands.home,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    said = re.search(
        r"error: step 0, samples 0 to 7 .*: (\d+) tokens counted in the loss, expected 512", done.stderr
    )
    assert said, done.stderr[-3000:]
    assert 0 < int(said[1]) < 512
