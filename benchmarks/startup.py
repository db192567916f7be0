"""What starting costs: CPU seconds from the interpreter's start to imports done, or to a command's end.

    python benchmarks/startup.py                               # imports of NeMo, models and trainer
    python benchmarks/startup.py -- recipes/pretrain.py +conf=demo_teacher trainer.max_steps=1
    python benchmarks/startup.py --baseline DIR                # another commit's worktree instead of eager imports

Both sides run the same command in turns, each time in a new process: this tree, and the baseline, which is this tree
with NEMO_MINITRON_EAGER_IMPORTS=1 unless --baseline names another. A recipe gets a run directory of its own each time.
Prints a JSON line with medians of CPU and wall seconds, and the ratio ours / baseline, median over pairs of runs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import nemo_minitron.nemo.models, nemo_minitron.nemo.trainer"


def once(command: list[str], tree: Path, eager: bool) -> tuple[float, float]:
    """CPU seconds of a new process and its children, and wall seconds."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "NEMO_MINITRON_EAGER_IMPORTS": str(int(eager))}
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{command} failed:\n{ended.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - begin


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """The sides in turn; the first pair warms the disk's cache and does not count."""
    trees = {"ours": (ROOT, False), "baseline": (a.baseline or ROOT, a.baseline is None)}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in trees}
    for run in range(a.runs + 1):
        for side, (tree, eager) in trees.items():
            with tempfile.TemporaryDirectory() as directory:
                own = [f"run_dir={directory}/run"] if a.command else []
                command = [sys.executable, *(a.command or ["-c", IMPORTS]), *own]
                taken = once(command, tree, eager)
            if run:
                found[side].append(taken)
    line: dict[str, Any] = {"command": " ".join(a.command) or "imports", "runs": a.runs}
    for number, key in enumerate(("cpu_s", "wall_s")):
        for side, each in found.items():
            line[f"{key}_{side}"] = round(statistics.median(run[number] for run in each), 3)
        ratios = [mine[number] / other[number] for mine, other in zip(*found.values(), strict=True)]
        line[f"{key}_ratio"] = round(statistics.median(ratios), 4)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--baseline", type=Path, help="a worktree of another commit")
    parser.add_argument("command", nargs="*", help="a recipe with its overrides, after --")
    print(json.dumps(compare(parser.parse_args())))


if __name__ == "__main__":
    main()
