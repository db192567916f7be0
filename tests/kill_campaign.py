"""SIGKILL at random moments, of whatever belongs to a run; the next run has to end as one that nobody disturbed.

    python -m tests.kill_campaign --home DIR [--trials 200] [--hours 10] [--seed 0] [--only distill-pp2]

From the repository's root; a JSON line a trial. A trial is given by its seed: the recipe and layout, the victim and the
share of the undisturbed run's time after which it dies. It fails where another process of the run outlives the victim
by more than a minute, where the same command typed again does not end with exit code 0, or where what it made differs.
Where the run was done before the kill came, the trial counts as none. A home that an earlier campaign left is gone on
with, from another seed. docs/reliability.md has a record.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import conversations
from tests.support.commands import ROOT, Commands
from tests.support.kill_trials import LATEST, fields, pruned, ranks_of, trained

LAYOUTS = {
    "tp2": ["trainer.tensor_model_parallel_size=2"],
    "pp2": ["trainer.pipeline_model_parallel_size=2"],
    "dp2": ["trainer.data_parallel_size=2"],
    "one": [],
}
# What is killed; "all" is everything at once, as a machine's end. A rank that is "stopped" has to be ended.
VICTIMS = {"one": ("process", "all"), "many": ("rank 0", "rank 1", "launcher", "agent", "all", "stopped")}
STOPPED_S = "3"
OUTLIVES_S = 60
PATIENCE_S = 1500


@dataclass(frozen=True)
class Subject:
    """A recipe in one layout: its overrides but for `run_dir`, and what it made, to be compared."""

    recipe: str
    layout: str
    overrides: list[str]
    outcome: Callable[[Path], Any]

    @property
    def name(self) -> str:
        """As `--only` has it."""
        return f"{self.recipe}-{self.layout}"


def digests(run_dir: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files of these patterns, of which each has to fit one at least."""
    found = {pattern: sorted(run_dir.glob(pattern)) for pattern in patterns}
    assert all(found.values()), found
    files = [file for group in found.values() for file in group]
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def made(*patterns: str) -> Callable[[Path], Any]:
    """The result without measurements and without where it lies, and the files of these patterns."""

    def outcome(run_dir: Path) -> Any:
        measured = ("_s", "seconds", "_rss_gib_after_writing")
        said = {key: value for key, value in fields(run_dir).items() if not key.endswith(measured)}
        return json.dumps(said, sort_keys=True).replace(str(run_dir), "RUN"), digests(run_dir, *patterns)

    return outcome


def searched(run_dir: Path) -> Any:
    """The candidates' losses by name, the best one and its plan."""
    tried = {file.stem: json.loads(file.read_text()) for file in (run_dir / "candidates").glob("*.json")}
    losses = {name: entry["lm_loss_nats"] for name, entry in tried.items() if "lm_loss_nats" in entry}
    assert losses
    plan = json.loads((run_dir / "plan.json").read_text())
    return losses, json.loads((run_dir / "result.json").read_text())["best"], plan["target"]


def piped(run_dir: Path) -> Any:
    """The pruning's scores, every step of the distillation, the weights of the GGUF file."""
    (file,) = (run_dir / "gguf").rglob("*.gguf")
    scores = digests(run_dir, "prune/scores.safetensors")
    return scores, trained(run_dir / "distill")[1], file.read_bytes()[-200_000:]


def training(group: str, steps: int = 10) -> list[str]:
    """A checkpoint every 3 steps."""
    own = [f"max_steps={steps}", "val_check_interval=3", "limit_val_batches=1", "optim.warmup_steps=1"]
    return [f"{group}.{setting}" for setting in own]


def subjects(commands: Commands) -> list[Subject]:
    """All recipes that keep something, in the layouts they have; makes a teacher and a student first."""
    teacher, student, files = commands.home / "teacher-hf", commands.home / "student", commands.home / "files"
    if not (student / "result.json").exists():
        commands.pretrain(commands.home / "teacher", "trainer.max_steps=10", f"export_dir={teacher}").result()
        commands.prune(teacher, student).result()
    numbers = {"train": range(16), "valid": range(100, 108)}
    chats = {f"align.{k}": conversations.conversations(files / f"{k}.jsonl", n) for k, n in numbers.items()}
    pairs = {f"align.{k}": conversations.pairs(files / f"pairs-{k}.jsonl", n) for k, n in numbers.items()}
    scoring, width = ["prune.calibration_samples=32", f"source={teacher}"], "+conf=width"
    align = [f"student={student}", *training("align"), "align.max_epochs=10", "align.global_batch_size=8"]
    new = {"samples": 24, "batch_size": 8, "max_new_tokens": 24, "opening_tokens": 8, "min_new_tokens": 4}
    writing = [f"synthesize.{key}={value}" for key, value in new.items()]
    sizes = "{hidden_size:[48,32],ffn_hidden_size:[80,48],num_attention_heads:null,num_layers:null}"
    grid = ["search.budget.parameters=0.72/1", "search.slack=0.4", f"search.grid={sizes}"]
    off = ("correct", "sft", "preference", "answers", "evaluate", "export", "device", "report")
    steps = [
        f"source={teacher}",
        *(f"pipeline.steps.{name}.on=false" for name in off),
        "pipeline.steps.prune.set.prune.calibration_samples=16",
        *training("pipeline.steps.distill.set.distill", 4),
        "pipeline.steps.gguf.set.export.quantization=F32",
        "pipeline.steps.gguf.set.license=mit",
    ]
    learn, instruct = [f"teacher={teacher}", *training("distill")], "+conf=instruct"
    many = ("tp2", "pp2", "dp2")
    recipes: list[tuple[str, tuple[str, ...], list[str], Callable[[Path], Any]]] = [
        ("prune", many, [width, *scoring], pruned),
        ("distill", many, [width, f"student={student}", *learn], trained),
        ("cache_teacher", many, [width, *learn, "cache.shard_mib=1"], made("cache/*.safetensors")),
        ("synthesize", many, [f"teacher={teacher}", *writing], made("text/*.jsonl")),
        ("sft", many, [instruct, *align, *(f"{k}={v}" for k, v in chats.items())], trained),
        ("preference", many, [instruct, *align, *(f"{k}={v}" for k, v in pairs.items())], trained),
        ("search", ("one", "tp2"), [*scoring, "prune=width", *grid], searched),
        ("export", ("one",), [f"source={student}", "license=none", "to=RUN/hf"], made("hf/*.safetensors")),
        ("pipeline", ("one",), steps, piped),
    ]
    return [
        Subject(recipe, layout, fitted(commands, recipe, layout, overrides), outcome)
        for recipe, layouts, overrides, outcome in recipes
        for layout in layouts
    ]


def fitted(commands: Commands, recipe: str, layout: str, overrides: list[str]) -> list[str]:
    """With the corpus, where there is one, and the layout."""
    batch = (
        ["trainer.micro_batch_size=4"] if layout != "one" and recipe not in ("prune", "synthesize") else []
    )
    if layout == "dp2" and recipe in ("prune", "synthesize"):
        batch = ["trainer.global_batch_size=16"]
    corpus = [] if recipe == "export" else commands.data()
    begin = [text for text in overrides if text.startswith("+conf=")]
    return [*begin, *corpus, *(o for o in overrides if o not in begin), *LAYOUTS[layout], *batch]


class Campaign:
    """The trials of one home; what nobody disturbed is run when it is first needed."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.commands = Commands(home, home / "cache")
        self.subjects = subjects(self.commands)
        self.expected: dict[str, tuple[Any, float]] = {}

    def start(self, subject: Subject, run_dir: Path) -> "subprocess.Popen[bytes]":
        """What is printed goes to RUN.log."""
        overrides = [text.replace("RUN/", f"{run_dir}/") for text in subject.overrides]
        nproc = None if subject.layout == "one" else 2
        command = self.commands.command(subject.recipe, *overrides, f"run_dir={run_dir}", nproc=nproc)
        environment = self.commands.environment(NEMO_MINITRON_STOPPED_S=STOPPED_S)
        with open(f"{run_dir}.log", "ab") as log:
            return subprocess.Popen(command, env=environment, cwd=self.commands.home, stdout=log, stderr=log)

    def undisturbed(self, subject: Subject) -> tuple[Any, float]:
        """What a subject makes, and the seconds that it takes; an earlier campaign's in the same home stands."""
        if subject.name not in self.expected:
            run_dir = self.commands.home / f"undisturbed-{subject.name}"
            if not (run_dir / "result.json").exists():
                code = self.start(subject, run_dir).wait(timeout=PATIENCE_S)
                assert code == 0, Path(f"{run_dir}.log").read_text()[-3000:]
            seconds = json.loads((run_dir / "result.json").read_text())["wall_s"]
            self.expected[subject.name] = subject.outcome(run_dir), seconds
        return self.expected[subject.name]

    def trial(self, seed: int, only: str | None) -> dict[str, Any]:
        """One kill, one more run, and the comparison: what is to be recorded; `same` is the verdict."""
        draw = random.Random(seed)
        subject = draw.choice([s for s in self.subjects if only is None or s.name == only])
        victim = draw.choice(VICTIMS["one" if subject.layout == "one" else "many"])
        share = LATEST * draw.random()
        expected, seconds = self.undisturbed(subject)
        run_dir = self.commands.home / f"trial-{seed}-{subject.name}"
        record = {"seed": seed, "run": subject.name, "victim": victim, "share": round(share, 3)}
        process = self.start(subject, run_dir)
        ranks = there(process, subject, run_dir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=share * seconds)
        late = process.poll() is not None or not self.kill(victim, process, ranks)
        began = time.monotonic()
        code = process.wait(timeout=OUTLIVES_S + (300 if late else 0))
        self.commands.wait_for_orphans(OUTLIVES_S)
        record |= {"ended_s": round(time.monotonic() - began, 1), "code": code}
        if late or (run_dir / "result.json").exists():
            return {**record, "killed": False, "same": subject.outcome(run_dir) == expected}
        held = ", ".join(sorted(path.name for path in run_dir.glob("*") if path.suffix != ".log"))
        again = self.start(subject, run_dir).wait(timeout=PATIENCE_S)
        same = again == 0 and subject.outcome(run_dir) == expected
        return {**record, "killed": True, "held": held, "again": again, "same": same}

    def kill(self, victim: str, process: "subprocess.Popen[bytes]", ranks: dict[int, int]) -> bool:
        """Whether it was there to be killed."""
        if victim == "all":
            pids = list(self.commands.processes())
        elif victim == "agent":
            pids = [parent_of(ranks[0])] if ranks and Path(f"/proc/{ranks[0]}").exists() else []
        elif victim in ("launcher", "process"):
            pids = [process.pid]
        else:
            pids = [ranks[0 if victim == "rank 0" else 1]] if ranks else []
        number = signal.SIGSTOP if victim == "stopped" else signal.SIGKILL
        try:
            for pid in pids:
                os.kill(pid, number)
        except ProcessLookupError:
            return victim == "all"
        return bool(pids)


def there(process: "subprocess.Popen[bytes]", subject: Subject, run_dir: Path) -> dict[int, int]:
    """Wait for the ranks, or for the run directory of a single process; the ranks' process ids."""
    while process.poll() is None:
        ranks = ranks_of(run_dir) if subject.layout != "one" else {}
        if len(ranks) == 2 or (subject.layout == "one" and (run_dir / ".lock").exists()):
            return ranks
        time.sleep(0.05)
    return {}


def parent_of(pid: int) -> int:
    """The process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def main() -> int:
    """Trials until so many were killed or the time is over; 1 if one of them ended differently."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others' follow it")
    parser.add_argument("--only", help="one recipe in one layout, as the records name it")
    options = parser.parse_args()
    assert Path.cwd() == ROOT, f"run it from {ROOT}"
    begin, killed, wrong, seed = time.monotonic(), 0, 0, options.seed
    campaign = Campaign(options.home.absolute())
    while killed < options.trials and time.monotonic() - begin < options.hours * 3600:
        record = campaign.trial(seed, options.only)
        print(json.dumps(record), flush=True)
        killed, wrong, seed = killed + record["killed"], wrong + (not record["same"]), seed + 1
    hours = round((time.monotonic() - begin) / 3600, 2)
    print(
        json.dumps({"killed": killed, "different": wrong, "seeds": [options.seed, seed - 1], "hours": hours})
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
