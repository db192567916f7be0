"""What `recipes/plan_run.py` says beside what a run takes: memory beyond imports, seconds of a step.

    python benchmarks/plan_run.py distill student=RUN teacher=DIR distill.max_steps=4 trainer.micro_batch_size=2

The recipe (distill or correct_teacher) runs with what is typed, then it is planned with `plan.gpu=here`, both in
processes of their own, in a temporary directory. Prints a JSON line; ratios are estimated / measured. Memory is the
process's peak less what it held before the first model was there; a checkpoint should have been converted by an earlier
run. Seconds are the middle step's, without the first; with --cpu they are CPU seconds on one thread, the difference of
two runs of which one has twice the steps, for a machine on which other things run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=["distill", "correct_teacher"])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cpu", type=int, metavar="STEPS", help="CPU seconds of a step, of so many steps")
    return parser


def result_of(recipe: str, *overrides: str) -> dict[str, Any]:
    """Run a recipe; its result.json, and the CPU seconds that it took."""
    before = _cpu()
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *overrides],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return {**json.loads(Path(done.stdout.splitlines()[-1]).read_text()), "cpu_s": _cpu() - before}


def _cpu() -> float:
    """CPU seconds of children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(a: argparse.Namespace, place: str) -> tuple[float, float]:
    """GiB beyond imports, and seconds of a step."""
    run_dir = Path(place) / "run"
    if a.cpu:
        # One validation of one batch in both.
        runs = [
            result_of(
                a.recipe,
                *a.overrides,
                "distill.limit_val_batches=1",
                f"distill.val_check_interval={n}",
                f"distill.max_steps={n}",
                f"run_dir={run_dir}{n}",
            )
            for n in (a.cpu, 2 * a.cpu)
        ]
        return _beyond(runs[1]), (runs[1]["cpu_s"] - runs[0]["cpu_s"]) / a.cpu
    run = result_of(a.recipe, *a.overrides, f"run_dir={run_dir}")
    lines = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if line["split"] == "train"]
    return _beyond(run), statistics.median(steps[1:])


def _beyond(run: dict[str, Any]) -> float:
    return float(run["peak_rss_gib"] - run["rss_gib_before_models"])


def main() -> None:
    a = arguments().parse_intermixed_args()
    if a.cpu:
        os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        beyond, step_s = measure(a, place)
        planned = [*a.overrides, f"plan.recipe={a.recipe}", "plan.gpu=here", f"run_dir={place}/plan"]
        planned += [f"distill.max_steps={a.cpu}"] if a.cpu else []
        plan = result_of("plan_run", *planned)
    (row,) = plan["steps_planned"]
    line = {
        "recipe": a.recipe,
        "memory_gib": round(beyond, 3),
        "memory_ratio": round(row["memory_gib"] / beyond, 3),
        "step_s": round(step_s, 3),
        "step_ratio": round(row["step_s"] / step_s, 3),
        "parts_gib": {name: round(value, 3) for name, value in row["memory_parts_gib"].items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
