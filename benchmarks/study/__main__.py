"""Runs the study, a row at a time; what is finished is not done again: make reproduce

    make reproduce                                          # all rows of the demo teacher, three seeds
    make reproduce ARGS='--only origin,shape --seeds 2'     # some of them
    make reproduce ARGS='--list'                            # what is done, CPU hours that are left; runs nothing
    make reproduce ARGS='--real FILE --steps 200'           # the real 135M's (make real-model); STUDY=DIR: elsewhere
    make reproduce ARGS='--real FILE --steps 640 --at-once 8'   # where a GPU has room for eight runs

A row is made of runs of the recipes, each in HOME/STUDY/seed-N/RUN, which rows share. A run that was killed goes on.
The seed decides the order of the corpus, which sequences are held out for the losses, random prunings and weights; all
arms of a seed have the same. Losses are compared as gaps to the teacher's on the same sequences, their error bars are
two standard errors of the mean over seeds. HOME/STUDY/study.md and study.png have what came of it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.study import rows, table
from benchmarks.study.home import Home
from benchmarks.study.hours import hours_left
from benchmarks.study.rows import Row, Run
from nemo_minitron.environment import BAD_INPUT, INTERRUPTED_BY_USER
from nemo_minitron.errors import FailedRun, InputError, InterruptedRun
from nemo_minitron.files import write_text
from nemo_minitron.workflows.pipeline.steps import content_of

_FIRST_SEED = 1


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, required=True, help="of all runs")
    parser.add_argument(
        "--list", action="store_true", help="show what is done and what is left, and run nothing"
    )
    parser.add_argument(
        "--table", action="store_true", help="write the tables and the picture, and run nothing"
    )
    parser.add_argument("--only", default="", help="rows, comma-separated; else all of the teacher's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of every arm")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--real", metavar="FILE", help="a checkpoint of 135M: its rows instead of the demo's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="to every run")
    return parser


def main() -> int:
    """Exit codes: 0 all is done; 1 a run failed, the others were done; 2 bad input; 130 told to end."""
    a = arguments().parse_args()
    try:
        home, chosen, seeds = opened(a)
        if not (a.list or a.table):
            failed = carry_out(home, chosen, seeds, a.at_once)
            write(home, seeds, {})
            print(f"{home.place / 'study.md'}", flush=True)
            return failed
        left = {row.name: hours_left(home, row, seeds) for row in chosen}
        print("\n".join(listing(home, chosen, seeds, left)))
        if a.table:
            write(home, seeds, left)
            print(home.place / "study.md")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (InterruptedRun, KeyboardInterrupt) as stop:
        print(f"interrupted: {stop or 'Ctrl-C'}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED_BY_USER
    return 0


def opened(a: argparse.Namespace) -> tuple[Home, list[Row], range]:
    """The runs' place, the rows that are asked for, and the seeds.

    Raises:
        InputError: a row or a teacher that there is not, no seed, too few steps.
    """
    for name, least in (("seeds", 1), ("steps", 2), ("at_once", 1)):
        if getattr(a, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {getattr(a, name)}: must be at least {least}")
    study = rows.real(str(Path(a.real).expanduser().absolute()), a.steps) if a.real else rows.demo(a.steps)
    if (teacher := content_of(Path(study.teacher))) is None:
        raise InputError(f"--real {a.real}: is no checkpoint and no file; make real-model fetches one")
    asked = [name for name in a.only.split(",") if name]
    known = [row.name for row in study.rows]
    if unknown := [name for name in asked if name not in known]:
        raise InputError(f"--only {','.join(unknown)}: must be among {', '.join(known)}")
    chosen = [row for row in study.rows if not asked or row.name in asked]
    return Home(a.home, study, teacher, a.set), chosen, range(_FIRST_SEED, _FIRST_SEED + a.seeds)


def carry_out(home: Home, chosen: Sequence[Row], seeds: Sequence[int], at_once: int = 1) -> int:
    """Make all runs, a line for each; 1 where one failed.

    Args:
        at_once: runs at a time; of more than one, those that others need come first, whatever their seed.
    """
    wanted = list(home.wanted(chosen, seeds))
    for run, seed in wanted:  # another study's runs are refused before any work
        home.result(run, seed)
    if at_once > 1:
        wanted.sort(key=lambda each: len(list(home.study.chain(each[0].name))))
    made: dict[tuple[str, int], Future[bool]] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for number, (run, seed) in enumerate(wanted, 1):
            # What it needs was handed in before it, so that a worker that waits here waits for one at work.
            needs = [made[name, seed] for name in run.needs]
            where = f"{number}/{len(wanted)} {home.study.name} seed {seed} {run.name}"
            made[run.name, seed] = pool.submit(_one, home, run, seed, needs, where)
        try:
            done = [future.result() for future in made.values()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            home.interrupt()
            raise
    for row in chosen:
        measured = table.arms(home, row, seeds)
        for claim in row.claims:
            print(
                f"{row.name}: {claim.better} below {claim.worse}: {table.verdict(claim, measured)}",
                flush=True,
            )
    return int(not all(done))


def _one(home: Home, run: Run, seed: int, needs: Sequence[Future[Any]], where: str) -> bool:
    """Make one run after those that it needs; whether it went well."""
    for needed in needs:
        needed.result()
    try:
        made = home.carry_out(run, seed)
    except FailedRun as error:
        print(f"{where}: failed: {error}", flush=True)
        return False
    loss = made.get("lm_loss_nats_after")
    print(
        f"{where}: {home.record(run, seed)['cpu_s']:.0f} CPU s"
        + ("" if loss is None else f", LM loss {loss:.3f} nats"),
        flush=True,
    )
    return True


def listing(home: Home, chosen: Sequence[Row], seeds: Sequence[int], left: dict[str, float]) -> Iterator[str]:
    """A line a row: arms done of those wanted, CPU hours that they took, and about how many are left."""
    for row in chosen:
        done = sum(len(arm.gaps) for arm in table.arms(home, row, seeds).values())
        took = sum(home.record(run, seed).get("cpu_s", 0.0) for run, seed in home.wanted([row], seeds))
        yield (
            f"{row.name}: {done} of {len(seeds) * len(row.arms)} arms done, {took / 3600:.2f} CPU h; "
            f"about {left[row.name]:.2f} CPU h left: {row.asks}"
        )


def write(home: Home, seeds: Sequence[int], left: dict[str, float]) -> None:
    """The tables and the picture of all that is done."""
    write_text(home.place / "study.md", table.page(home, seeds, left))
    table.picture(home, seeds, home.place / "study.png")


if __name__ == "__main__":
    sys.exit(main())
