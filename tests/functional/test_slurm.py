"""launchers/slurm.sh against a real SLURM: one node on loopback, started for these tests."""

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Pruned, Teacher
from tests.support.commands import ROOT, Commands
from tests.support.kill_trials import ranks_of, unmeasured
from tests.support.slurm_cluster import SITE, Slurm, log, loopback, result

pytestmark = [pytest.mark.slow, pytest.mark.alone]

DATA_RANKS = ["trainer.data_parallel_size=2", "trainer.global_batch_size=16"]
TENSOR_RANKS = "trainer.tensor_model_parallel_size=2"
STEPS = 20


@pytest.fixture(scope="module")
def slurm(commands: Commands) -> Iterator[Slurm]:
    with loopback(commands) as cluster:
        yield cluster


# ---- recipes that need no model ----------------------------------------------------------------------------


def test_ranks_meet_under_srun(slurm: Slurm) -> None:
    """torch.distributed finds its peers by what the job's script and slurm_rank.py set."""
    recipe = slurm.tiny(
        "meet",
        """import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("sum", total.item(), "rank", rank, os.environ["OMP_NUM_THREADS"], os.environ["NCCL_DEBUG"], r.cluster)""",
    )
    run_dir = slurm.home / "met, 100%"  # characters that mean something to Hydra and to sbatch
    done = slurm.submit("--wait", recipe, *SITE, f"run_dir='{run_dir}'", *DATA_RANKS)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert f"job {job}, 1 node of 2 ranks, in {run_dir}" in done.stderr
    assert f"tail -F {run_dir}/logs/slurm-{job}.log" in done.stderr
    assert "sum 3.0 rank 0 1 WARN None" in log(run_dir, job)
    assert (run_dir / "logs" / "rank1.stdout.log").read_text() == "sum 3.0 rank 1 1 WARN None\n"
    assert result(run_dir)["ranks"] == 2


def test_a_failing_rank_s_code_and_log_come_back(slurm: Slurm) -> None:
    work = "if rank == 1: raise FloatingPointError('the loss is nan')\ntime.sleep(600)"
    run_dir = slurm.home / "failed"
    done = slurm.submit("--wait", slurm.tiny("failing", work), *SITE, f"run_dir={run_dir}", *DATA_RANKS)
    assert done.returncode == 1
    assert "FloatingPointError: the loss is nan" in done.stderr
    assert f"rank 1 failed with exit code 1; logs: {run_dir}/logs" in done.stderr
    assert slurm.state(done.stdout.strip()) == "FAILED"
    assert slurm.shown(done.stdout.strip())["ExitCode"] == "1:0"
    assert not (run_dir / "result.json").exists()


def test_a_rank_that_a_signal_ends(slurm: Slurm) -> None:
    recipe = slurm.tiny("signalled", "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)")
    done = slurm.submit("--wait", recipe, *SITE, f"run_dir={slurm.home}/signalled", *DATA_RANKS)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed with exit code 137" in done.stderr


def test_what_the_job_refuses_starts_no_rank(slurm: Slurm) -> None:
    """At submission only what can be read at once is checked; the rest comes out when the job prepares."""
    recipe = slurm.tiny("refusing", "")
    check = "lambda r: parse(PruneRecipe, OmegaConf.create({'source': 'x', 'run_dir': 'x', 'seed': -1}))"
    text = recipe.read_text().replace("lambda r: Ready()", check)
    recipe.write_text(
        "from nemo_minitron.config.recipes import parse\nfrom omegaconf import OmegaConf\n" + text
    )
    done = slurm.submit("--wait", recipe, *SITE, f"run_dir={slurm.home}/refused")
    assert done.returncode == 2
    assert "error: seed=-1: must be at least 0" in done.stderr
    assert not list((slurm.home / "refused" / "logs").glob("failed.*"))


def test_a_chain_waits_and_stops_where_it_breaks(slurm: Slurm) -> None:
    """Three jobs; the second fails, so the third is cancelled and its work never done."""
    good, bad = slurm.tiny("good", "time.sleep(1)"), slurm.tiny("bad", "raise ValueError('no')")
    first, second, third = (slurm.home / "chain" / str(number) for number in range(3))
    chain: list[object] = [good, *SITE, f"run_dir={first}"]
    chain += ["--then", bad, *SITE, f"run_dir={second}", "source=@"]
    chain += ["--then", good, *SITE, f"run_dir={third}", "source=@"]
    done = slurm.submit("--wait", *chain)
    assert done.returncode == 1
    jobs = done.stdout.split()
    assert [slurm.state(job) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert slurm.shown(jobs[1])["StartTime"] >= slurm.shown(jobs[0])["EndTime"]
    assert f"source: {first}\n" in (second / "job.yaml").read_text()
    assert "ValueError: no" in done.stderr  # the log of the one that failed
    assert result(first)["seed"] == 0
    assert not (third / "resolved.yaml").exists()


def test_a_sweep_is_a_job_array(slurm: Slurm) -> None:
    base = slurm.home / "sweep"
    recipe = slurm.tiny("swept", "print('seed', r.prune.seed)")
    done = slurm.submit("--wait", recipe, *SITE, "-m", f"run_dir={base}", "prune=width", "prune.seed=3,5,7")
    assert done.returncode == 0, done.stderr
    (job,) = done.stdout.split()
    assert [result(base / str(number))["seed"] for number in range(3)] == [3, 5, 7]
    assert [f"seed {seed}" in log(base, f"{job}_{n}") for n, seed in enumerate((3, 5, 7))] == [True] * 3
    assert "--array=0-2" in (base / "job.sbatch").read_text()


def test_a_time_limit_without_a_checkpoint(slurm: Slurm) -> None:
    """The signal comes, there is nothing to save: the job fails and says why, and does not go round in circles."""
    run_dir = slurm.home / "too-long"
    site = ["cluster.gpus_per_node=0", "cluster.time=4", "cluster.signal_s=238"]
    done = slurm.submit("--wait", slurm.tiny("sleeping", "time.sleep(600)"), *site, f"run_dir={run_dir}")
    assert done.returncode == 128 + signal.SIGUSR1
    assert "the time limit came before training: give it more cluster.time" in done.stderr
    assert slurm.shown(done.stdout.strip())["Restarts"] == "0"


def test_a_run_directory_is_submitted_once(slurm: Slurm) -> None:
    run_dir = slurm.home / "twice"
    arguments = [slurm.tiny("waiting", "time.sleep(600)"), *SITE, f"run_dir={run_dir}"]
    job = slurm.submit(*arguments).stdout.strip()
    again = slurm.submit(*arguments)
    assert again.returncode == 2
    assert again.stdout == ""
    assert f"job {job} is in the queue for it" in again.stderr
    slurm.ask("scancel", job)
    assert slurm.end(job) == "CANCELLED"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster.partition=nope"], ["sbatch", "nvalid partition", "nope"]),
        (["cluster.account=x", "trainer.num_nodes=2", *DATA_RANKS], ["sbatch", "node"]),
        (["source=/nowhere"], ["source=/nowhere", "no such directory"]),
        (
            ["--then", "GOOD", *SITE, "source=@", "run_dir=never-2", "cluster.partition=nope"],
            ["sbatch", "nope"],
        ),
    ],
)
def test_refused_and_nothing_submitted(slurm: Slurm, overrides: list[str], says: list[str]) -> None:
    good = slurm.tiny("good", "pass")
    run_dir = slurm.home / "never"
    more = [str(good) if text == "GOOD" else text for text in overrides]
    done = slurm.submit(good, *SITE, f"run_dir={run_dir}", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in says:
        assert part in done.stderr
    assert not run_dir.exists()
    assert slurm.ask("squeue", "-h") == ""


# ---- pruning and distillation ------------------------------------------------------------------------------


def steps(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of steps.jsonl by split and step; each step is there once."""
    lines = [unmeasured(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    found = {(line["split"], line["step"]): line for line in lines}
    # The teacher is measured each time that it is loaded.
    assert len(found) == len([line for line in lines if line["split"] != "teacher"]) + 1
    return found


def distilling(commands: Commands, teacher: Teacher, student: object, run_dir: Path) -> list[object]:
    return [
        *commands.data(),
        "+conf=width",
        TENSOR_RANKS,
        *SITE,
        f"student={student}",
        f"teacher={teacher.huggingface}",
        f"run_dir={run_dir}",
        f"distill.max_steps={STEPS}",
        "distill.val_check_interval=5",
        "distill.limit_val_batches=1",
        "distill.optim.warmup_steps=1",
    ]


@pytest.fixture(scope="module")
def chained(slurm: Slurm, commands: Commands, teacher: Teacher) -> Path:
    """A directory with `prune` and `distill`, two tensor-parallel ranks each, a pipeline submitted as one chain."""
    base = commands.home / "chained"
    shared = [*commands.data(), TENSOR_RANKS]
    pruning = commands.pruning(teacher.huggingface, base / "prune")
    learning = distilling(commands, teacher, "@prune", base / "distill")
    steps = [
        f"pipeline.steps.{name}." + text.replace("+conf", "preset")
        if "+conf" in text
        else f"pipeline.steps.{name}.set.{text}"
        for name, given in (("prune", pruning), ("distill", learning))
        for text in map(str, given)
        if text not in [*shared, *SITE] and not text.startswith("run_dir=")
    ]
    off = ("correct", "sft", "preference", "answers", "evaluate", "export", "gguf", "device", "report")
    asked = [*shared, *steps, *(f"pipeline.steps.{name}.on=false" for name in off), f"run_dir={base}"]
    pipeline = commands.command("pipeline")[-1]
    done = slurm.submit("--wait", pipeline, *asked, *SITE, timeout=500)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    again = commands.run("pipeline", *asked)
    assert all(run["kept"] for run in again.result()["runs"])
    return base


def test_a_chain_of_two_rank_jobs(chained: Path, pruned: Pruned) -> None:
    """The pruned model is that of one process without SLURM, and the next job learned from it."""
    made, alone = result(chained / "prune"), pruned.result
    assert (made["ranks"], made["tensor_model_parallel_size"], alone["ranks"]) == (2, 2, 1)
    assert made["lm_loss_nats_after"] == pytest.approx(alone["lm_loss_nats_after"], rel=1e-5)
    plans = [
        json.loads((run / "plan.json").read_text())["kept"] for run in (chained / "prune", pruned.run_dir)
    ]
    assert plans[0] == plans[1]
    learned = result(chained / "distill")
    assert learned["student"] == str(chained / "prune")
    assert learned["lm_loss_nats_before"] == pytest.approx(alone["lm_loss_nats_after"], rel=1e-5)
    assert learned["lm_loss_nats_after"] < learned["lm_loss_nats_before"]


def pause_after(slurm: Slurm, job: str, run_dir: Path, step: int) -> int:
    """Stop rank 0, and with it all, once this step is done: SLURM takes seconds to act, the steps do not.

    Returns:
        its process id.
    """
    slurm.wait(job, lambda: (run_dir / "steps.jsonl").exists() and ("train", step) in steps_so_far(run_dir))
    pid = ranks_of(run_dir)[0]
    os.kill(pid, signal.SIGSTOP)
    return pid


def go_on_at(slurm: Slurm, job: str, pid: int, number: signal.Signals) -> None:
    """Let a stopped process go on once SLURM has sent it this signal."""

    def sent() -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        pending = re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
        # Ahead of SIGTERM SLURM sends SIGCONT, which is what is waited for, too.
        return not re.search(r"^State:\s*T", status, re.MULTILINE) or bool(
            pending and int(pending[1], 16) >> (number - 1) & 1
        )

    slurm.wait(job, sent)
    os.kill(pid, signal.SIGCONT)


def test_preempted_and_out_of_time_and_yet_the_same(
    slurm: Slurm, commands: Commands, teacher: Teacher, chained: Path
) -> None:
    """A more urgent job drives the training away; later its time limit comes. Every loss is that of the run that was
    left alone, and so is the student."""
    run_dir = commands.home / "disturbed"
    distill = commands.command("distill")[-1]
    # A signal so long before the limit that an update of the limit brings it at once.
    site = ["cluster.signal_s=290"]
    submitted = slurm.submit(distill, *distilling(commands, teacher, chained / "prune", run_dir), *site)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    paused = pause_after(slurm, job, run_dir, 3)
    urgent = slurm.ask(
        "sbatch", "--parsable", "-p", "urgent", "-n", "2", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    go_on_at(slurm, job, paused, signal.SIGTERM)
    slurm.wait(job, lambda: slurm.shown(job)["Restarts"] == "1")
    preempted_after = max(step for split, step in steps_so_far(run_dir) if split == "train")
    assert slurm.end(urgent) == "COMPLETED"

    paused = pause_after(slurm, job, run_dir, preempted_after + 2)
    slurm.ask("scontrol", "update", f"jobid={job}", "TimeLimit=5")
    go_on_at(slurm, job, paused, signal.SIGUSR1)
    slurm.wait(job, lambda: slurm.shown(job)["Restarts"] == "2")
    slurm.ask("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    assert slurm.end(job) == "COMPLETED", log(run_dir, job)

    said = log(run_dir, job)
    assert said.count("interrupted: a checkpoint was saved after step") == 2
    assert said.count("interrupted, goes back into the queue") == 2
    assert steps(run_dir) == steps(chained / "distill")
    disturbed, alone = result(run_dir), result(chained / "distill")
    for measured in ("lm_loss_nats_after", "kl_nats_after", "lm_loss_nats_before"):
        assert disturbed[measured] == alone[measured]


def steps_so_far(run_dir: Path) -> set[tuple[str, int]]:
    """Of a run that may be writing a line at the moment."""
    found = set()
    for line in (run_dir / "steps.jsonl").read_text().splitlines():
        if line.endswith("}"):
            entry = json.loads(line)
            found.add((entry["split"], entry["step"]))
    return found


@pytest.mark.usefixtures("slurm")  # skipped, by name, where that is
def test_the_loopback_commands_of_the_docs(commands: Commands) -> None:
    """As they stand, on a cluster of their own, from a directory without any of the repository."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    (block,) = re.findall(r"^```\n(eval .*?)^```", text, re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory(
        prefix="slurm-", dir="/tmp"
    ) as home:  # munge's socket wants a short path
        script = re.sub(r"\b(launchers|recipes)/", rf"{ROOT}/\1/", block).replace("/tmp/slurm", f"{home}/c")
        script = f"set -e\ntrap '{ROOT}/launchers/slurm_on_loopback.py stop {home}/c' EXIT\n{script}"
        done = subprocess.run(
            ["bash", "-c", script],
            env=commands.environment(),
            cwd=commands.home,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr
    (directory,) = re.findall(r"1 node of 2 ranks, in (\S+)", done.stderr)
    assert result(commands.home / directory)["tensor_model_parallel_size"] == 2
