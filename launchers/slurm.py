"""Submits a recipe to SLURM: `launchers/slurm.sh [options] recipes/X.py overrides... +cluster=slurm`.

The configuration is composed and checked here, once; a bad one ends with exit code 2 and nothing submitted. The job
(RUN/job.sbatch, readable, and RUN/job.yaml, resolved) prepares data and checkpoints in one process and then starts one
task a rank. stdout gets the job's id, stderr where it runs and how to follow it.

    --then recipes/Y.py ...   a job that starts when the one before has ended well; `@` stands for that one's
                              run directory: `student=@`. All are composed before the first is submitted.
    recipes/pipeline.py       is such a chain, of the steps that its run directory lacks.
    -m                        a sweep, as Hydra's: one job array, each configuration in a run directory of its own.

What the site gives is in conf/cluster/*.yaml; `+cluster=slurm` is the default, `cluster.partition=NAME` and the like
override it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launchers import sbatch  # noqa: E402
from launchers.sbatch import Job  # noqa: E402
from nemo_minitron import scratch  # noqa: E402
from nemo_minitron.environment import CHAIN, COMPOSE, RESULT, with_package  # noqa: E402
from nemo_minitron.run.job_spec import HYDRA_WRITES_NOTHING  # noqa: E402

SWEEP = ("-m", "--multirun")
PIPELINE = "pipeline.py"
TAIL_LINES = 30


class Refused(Exception):
    """Bad input: one line, exit code 2, nothing submitted."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(2, f"launchers/slurm.sh: {message} (--help explains)\n")


def parser_of_options() -> Parser:
    """The launcher's own options, and the first recipe with all that follows."""
    parser = Parser(
        prog="launchers/slurm.sh",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the jobs, submit nothing, write nothing"
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="until the last has ended; ends with the exit code of the first that failed",
    )
    parser.add_argument(
        "--after", action="append", default=[], metavar="JOBID", help="start when that job has ended well"
    )
    parser.add_argument(
        *SWEEP, dest="sweep", action="store_true", help="sweep over comma-separated overrides"
    )
    parser.add_argument("recipe", type=Path, help="recipes/X.py")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="of its configuration; --then recipes/Y.py ..."
    )
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, and `steps`, the recipes with their overrides; bad ones end it with exit code 2."""
    parser = parser_of_options()
    options = parser.parse_args(arguments)
    options.steps = steps([str(options.recipe), *options.overrides])
    for step in options.steps:
        if not step or not Path(step[0]).is_file():
            parser.error(
                f"{step[0] if step else '--then'}: no such recipe; options of the launcher come before it"
            )
        if options.sweep or set(SWEEP) & set(step):  # Hydra takes it only in front of the overrides
            step[1:] = ["-m", *(text for text in step[1:] if text not in SWEEP)]
    for job in options.after:
        if not re.fullmatch(r"\d+", job):
            parser.error(f"--after {job}: must be the number of a job")
    return options


def steps(arguments: list[str]) -> list[list[str]]:
    """The recipes of a chain, each with its overrides."""
    found: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--then":
            found.append([])
        else:
            found[-1].append(argument)
    return found


def chain_of(step: list[str]) -> list[list[str]]:
    """A step as it is; of recipes/pipeline.py those of its own steps that are not made yet, each on the same cluster.

    Raises:
        SystemExit: the pipeline refused; its own line is on stderr.
    """
    recipe, *overrides = step
    if Path(recipe).name != PIPELINE:
        return [step]
    cluster = [text for text in overrides if re.match(r"\+?cluster[=@.]", text)]
    with scratch.directory("chain") as place:
        file = place / "chain.jsonl"
        own = [text for text in overrides if text not in cluster]
        code = subprocess.call(
            [sys.executable, recipe, *own], env=with_package(**{CHAIN: str(file)}), stdout=sys.stderr
        )
        if code:
            sys.exit(code)
        found = [json.loads(line) for line in file.read_text().splitlines()]
    return [[str(Path(recipe).with_name(f"{name}.py")), *own, *cluster] for name, *own in found]


def compose(recipe: Path, overrides: list[str], before: Job | None) -> Job:
    """The recipe composes and checks its configuration in a process of its own, which writes nothing.

    Args:
        before: whose run directory `@` stands for.

    Raises:
        SystemExit: it refused; its own line is on stderr.
        Refused: the configurations of a sweep do not fit into one job array.
    """
    with scratch.directory("compose") as place:
        composed = place / "composed.jsonl"
        # In a run of its own Hydra writes nothing (conf/common.yaml); a sweep has a directory.
        own = [f"hydra.sweep.dir='{place}'", "hydra.sweep.subdir=${hydra.job.num}"]
        own += ["hydra/hydra_logging=none"]
        if not any(re.match(r"\+?cluster[=@]", override) for override in overrides):
            own.append("+cluster=slurm")
        command = [sys.executable, str(recipe), *(with_directory(text, before) for text in overrides), *own]
        code = subprocess.call(command, env=with_package(**{COMPOSE: str(composed)}), stdout=sys.stderr)
        if code:
            sys.exit(code)
        if not composed.exists():
            raise Refused(f"{recipe}: composed no configuration, so it is none of the project's recipes")
        found = [json.loads(line) for line in composed.read_text().splitlines()]
    return to_job(recipe, found, any(override.startswith("run_dir=") for override in overrides))


def with_directory(override: str, before: Job | None) -> str:
    """An override in which `@` alone as the value stands for the run directory of the job before.

    Raises:
        Refused: there is none, or it is a sweep.
    """
    key, _, value = override.partition("=")
    if value != "@":
        return override
    if before is None or len(before.runs) > 1:
        raise Refused(f"{override}: there is no single job before this one whose run directory it could be")
    quoted = str(before.runs[0]).replace("'", "\\'")
    return f"{key}='{quoted}'"


def to_job(recipe: Path, found: list[dict[str, Any]], named: bool) -> Job:
    """One job out of what the recipe composed.

    Args:
        named: whether the user chose the run directory; a sweep's stay as they are then, if they differ.

    Raises:
        Refused: a sweep over clusters or numbers of ranks, which one job array cannot have.
    """
    shapes = [(line["cluster"], line["ranks"], line["num_nodes"]) for line in found]
    if any(shape != shapes[0] for shape in shapes):
        raise Refused(
            "-m: a job array has one cluster and one number of ranks; submit one sweep for each of them"
        )
    runs = [Path(line["config"]["run_dir"]).absolute() for line in found]
    if len(runs) > 1 and not (named and len(set(runs)) == len(runs)):
        runs = [runs[0] / str(number) for number in range(len(runs))]
    configs = [{**line["config"], "run_dir": str(run)} for line, run in zip(found, runs, strict=True)]
    missing = sorted({key for line in found for key in line["missing"]})
    return Job(recipe, runs, configs, *shapes[0], missing=missing)


def check(job: Job, made: set[Path]) -> None:
    """Refuse what would fail only after hours in the queue.

    Args:
        made: run directories that earlier jobs of the chain will have filled.

    Raises:
        Refused: a value that is missing, a checkpoint that is not there or not whole, a run directory in use.
    """
    from nemo_minitron.checkpoints.source import find_source
    from nemo_minitron.config.recipes import DataConfig
    from nemo_minitron.errors import InputError

    if job.missing:
        raise Refused(f"{', '.join(job.missing)}: no value given")
    for config in job.configs:
        place = DataConfig(cache_dir=(config.get("data") or {}).get("cache_dir"))
        for key in ("source", "student", "teacher"):
            if config.get(key) and Path(config[key]).absolute() not in made:
                try:
                    find_source(config[key], key, place)
                except InputError as error:
                    raise Refused(str(error)) from None
    for run in job.runs:
        if run in made:
            raise Refused(f"run_dir={run}: two jobs of the chain would write into it")
        if queued := queued_in(run):
            raise Refused(
                f"run_dir={run}: job {queued} is in the queue for it; choose another, or scancel {queued}"
            )


def queued_in(run: Path) -> str | None:
    """The job that was submitted for a run directory and has not ended."""
    file = run / "logs" / "job_id"
    if not file.is_file():
        return None
    job = file.read_text().strip()
    asked = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=120
    )
    return job if asked.returncode == 0 and asked.stdout.strip() else None


def write(job: Job, script: str) -> Path:
    """RUN/job.yaml for each configuration and the sbatch file; returns the latter."""
    for run, config in zip(job.runs, job.configs, strict=True):
        (run / "logs").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({**config, **HYDRA_WRITES_NOTHING}, sort_keys=False)
        (run / f"{sbatch.CONFIGURATION}.yaml").write_text(text)
        (run / "resolved.yaml").unlink(missing_ok=True)
    (job.directory / "logs").mkdir(parents=True, exist_ok=True)
    file = job.directory / f"{sbatch.CONFIGURATION}.sbatch"
    file.write_text(script)
    return file


def try_all(jobs: list[Job]) -> None:
    """Ask SLURM whether it would take every one of them, before the first is submitted.

    Raises:
        Refused: with its own words.
    """
    for job in jobs:
        script = sbatch.render(job, [])
        asked = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=120
        )
        if asked.returncode:
            raise Refused(f"{job.name}: {slurm_says(asked.stderr)}")


def slurm_says(text: str) -> str:
    """What sbatch complains of, in one line."""
    return "sbatch: " + "; ".join(
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines()
    )


def submit(job: Job, after: list[str], *, wait: bool) -> str:
    """Hand a job to sbatch, and stay with it until it has ended where `wait` says so.

    Returns:
        its id.

    Raises:
        Refused: with SLURM's own words.
    """
    file = write(job, sbatch.render(job, after))
    command = ["sbatch", "--parsable", *(["--wait"] if wait else []), str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = process.stdout.readline().strip().split(";")[0]  # id;cluster where there are several
    if not number:
        raise Refused(f"{job.name}: {slurm_says(process.communicate()[1])}")
    for run in job.runs:
        (run / "logs" / "job_id").write_text(number + "\n")
    print(number, flush=True)
    tell(job, number, after)
    process.communicate()
    return number


def tell(job: Job, number: str, after: list[str]) -> None:
    """Where the job runs and how to follow it."""
    where = f"{job.num_nodes} node{'s' if job.num_nodes > 1 else ''} of {job.ranks_per_node} rank"
    lines = [
        f"{job.name}: job {number}{f' after {chr(44).join(after)}' if after else ''}, {where}"
        f"{'s' if job.ranks_per_node > 1 else ''}, in {job.directory}",
        f"  squeue -j {number}     scancel {number}",
        f"  tail -F {job.log.replace('%j', number).replace('%A', number).replace('%a', '*')}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def outcome(jobs: list[tuple[Job, str]]) -> int:
    """The exit code of the first job that left no result, whose log's end is shown; 0 if none failed.

    Not sbatch --wait's: to it a job that is cancelled because the one before failed is no failure.
    """
    for job, number in jobs:
        if all((run / RESULT).is_file() for run in job.runs):
            continue
        for log in sorted((job.directory / "logs").glob(f"slurm-{number}*.log")):
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print(f"--- the end of {log}:", *lines, "---", sep="\n", file=sys.stderr)
        return exit_code(number)
    return 0


def exit_code(number: str) -> int:
    """What SLURM remembers of a job that failed, as a shell gives it; 1 if it does not remember."""
    asked = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, timeout=120)
    found = [(int(code), int(sig)) for code, sig in re.findall(r"\bExitCode=(\d+):(\d+)", asked.stdout)]
    return next((128 + sig if sig else code for code, sig in found if code or sig), 1)


def dry_run(job: Job, after: list[str]) -> None:
    """Print the sbatch file and the configuration of each run."""
    print(sbatch.render(job, after))
    for run, config in zip(job.runs, job.configs, strict=True):
        print(f"# ---- {run}/{sbatch.CONFIGURATION}.yaml")
        shown = {key: value for key, value in config.items() if value not in (None, {})}
        print("".join(f"# {line}\n" for line in yaml.safe_dump(shown, sort_keys=False).splitlines()))
    if job.missing:
        print(f"{job.name}: no value yet for {', '.join(job.missing)}", file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """Compose all, check all, then submit all.

    Raises:
        Refused: nothing was submitted.
    """
    if options.dry_run and any(Path(step[0]).name == PIPELINE for step in options.steps):
        raise Refused(
            "--dry-run: a pipeline's jobs depend on what its directory holds; --cfg job shows its steps"
        )
    if not options.dry_run and shutil.which("sbatch") is None:
        raise Refused(
            "sbatch is not on the path, so this is no machine to submit from; --dry-run prints the job"
        )
    jobs: list[Job] = []
    for recipe, *overrides in [part for step in options.steps for part in chain_of(step)]:
        jobs.append(compose(Path(recipe), overrides, jobs[-1] if jobs else None))
    if options.dry_run:
        for number, job in enumerate(jobs):
            dry_run(job, [f"JOB_{number}"] if number else options.after)
        return 0
    made: set[Path] = set()
    for job in jobs:
        check(job, made)
        made |= set(job.runs)
    try_all(jobs)
    return submit_all(jobs, options.after, wait=options.wait)


def submit_all(jobs: list[Job], after: list[str], *, wait: bool) -> int:
    """Submit them, each to start after the one before; with `wait`, the exit code of the first that failed."""
    done: list[tuple[Job, str]] = []
    for job in jobs:
        number = submit(job, after, wait=wait and job is jobs[-1])
        done.append((job, number))
        after = [number]
    return outcome(done) if wait else 0


def main() -> int:
    """The command line; returns the exit code."""
    try:
        return run(parse(sys.argv[1:]))
    except Refused as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
