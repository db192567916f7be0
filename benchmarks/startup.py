"""What starting costs: CPU seconds from the interpreter's start to imports done, or to a command's end.

    python benchmarks/startup.py                               # imports of NeMo, models and trainer
    python benchmarks/startup.py -- recipes/pretrain.py +conf=demo_teacher trainer.max_steps=1
    python benchmarks/startup.py --baseline DIR                # another commit's worktree instead of eager imports
    python benchmarks/startup.py --until reduced_train_loss -- recipes/pretrain.py ...      # to the first step's loss

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

import psutil

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import nemo_minitron.nemo.models, nemo_minitron.nemo.trainer"


def once(command: list[str], tree: Path, eager: bool, until: str = "") -> tuple[float, float]:
    """CPU seconds of a new process and its children, and wall seconds: to its end, or until it has printed `until`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "NEMO_MINITRON_EAGER_IMPORTS": str(int(eager))}
    if until:
        return _printed(command, tree, environment, until.encode())
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{command} failed:\n{ended.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - begin


def _printed(command: list[str], tree: Path, environment: dict[str, str], text: bytes) -> tuple[float, float]:
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    seen = b""
    while text not in seen:
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            sys.exit(f"{command} ended without {text!r}:\n{seen[-3000:].decode(errors='replace')}")
        seen += part
    times, wall = psutil.Process(process.pid).cpu_times(), time.perf_counter() - begin
    process.kill()
    process.wait()
    return times.user + times.system + times.children_user + times.children_system, wall


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """The sides in turn; the first pair warms the disk's cache and does not count."""
    trees = {"ours": (ROOT, False), "baseline": (a.baseline or ROOT, a.baseline is None)}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in trees}
    for run in range(a.runs + 1):
        for side, (tree, eager) in trees.items():
            with tempfile.TemporaryDirectory() as directory:
                own = [f"run_dir={directory}/run"] if a.command else []
                command = [sys.executable, *(a.command or ["-c", IMPORTS]), *own]
                taken = once(command, tree, eager, a.until)
            if run:
                found[side].append(taken)
    line: dict[str, Any] = {"command": " ".join(a.command) or "imports", "until": a.until, "runs": a.runs}
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
    parser.add_argument("--until", default="", help="measure to the first output with this text")
    parser.add_argument("command", nargs="*", help="a recipe with its overrides, after --")
    print(json.dumps(compare(parser.parse_args())))


if __name__ == "__main__":
    main()
