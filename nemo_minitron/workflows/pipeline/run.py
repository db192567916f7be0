"""Runs the steps of a pipeline one after the other; those that are made stay, and it says what is left."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_minitron.config.pipeline import PipelineRecipe
from nemo_minitron.environment import BAD_INPUT, CHAIN, INTERRUPTED, INTERRUPTED_BY_USER, RESULT, with_package
from nemo_minitron.errors import FailedRun, InterruptedRun
from nemo_minitron.files import read_text, write_text
from nemo_minitron.workflows.pipeline.check import Prepared, command
from nemo_minitron.workflows.pipeline.state import State
from nemo_minitron.workflows.pipeline.steps import Step

SUMMARY = "summary.md"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def run(r: PipelineRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Make what is not made yet.

    Returns:
        `runs`: of each step, in order, its name and recipe, `seconds` over all starts, `kept` (it was made before),
        `said` (its closing line), and the path of its result.

    Raises:
        FailedRun: a step failed; those before it stay.
        InterruptedRun: a step was told to end, and saved.
    """
    state = State(directory.absolute())
    if file := os.environ.get(CHAIN):
        hand_over(prepared, state, Path(file))
        sys.exit(0)
    rows: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(prepared.steps, 1):
        key = prepared.keys[step.name]
        kept = state.is_done(step.name, key)
        where = f"{number}/{len(prepared.steps)} {step.name}"
        if kept:
            _say(f"{where}: kept; {state.steps[step.name].get('said', step.recipe)}")
        else:
            left = ", ".join(later.name for later in prepared.steps[number:])
            _say(f"{where}: begins" + (f"; then {left}" if left else ""))
            state.begin(step.name, key, prepared.source_sha256, prepared.pipeline)
            make(step, prepared.ranks[step.name], state)
            _say(f"{where}: {state.steps[step.name]['seconds']:,.0f} s; {state.steps[step.name]['said']}")
        rows[step.name] = _row(step, state, kept=kept)
        write_text(directory / SUMMARY, summary(rows, prepared.steps))
    return {"recipe": "pipeline", "source_sha256": prepared.source_sha256, "runs": list(rows.values())}


def hand_over(prepared: Prepared, state: State, file: Path) -> None:
    """Write the steps that are not made yet for a launcher: a JSON list, `recipe` and its overrides, in each line."""
    lines = []
    for step in prepared.steps:
        key = prepared.keys[step.name]
        if not state.is_done(step.name, key):
            state.begin(step.name, key, prepared.source_sha256, prepared.pipeline)
            lines.append(json.dumps([step.recipe, *step.overrides]))
    file.write_text("".join(f"{line}\n" for line in lines))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _row(step: Step, state: State, *, kept: bool) -> dict[str, Any]:
    known = state.steps[step.name]
    if "said" not in known:  # a job of a chain made it
        state.end(step.name, step.recipe, json.loads(read_text(step.directory / RESULT)).get("wall_s", 0))
    return {
        "step": step.name,
        "recipe": step.recipe,
        "kept": kept,
        "seconds": known.get("seconds"),
        "said": known.get("said"),
        "result": str(step.directory / RESULT),
    }


def summary(rows: dict[str, dict[str, Any]], steps: list[Step]) -> str:
    """The table of what is done and what is left, in Markdown."""
    lines = ["| step | recipe | seconds | it said |", "|---|---|---|---|"]
    for step in steps:
        row = rows.get(step.name, {"seconds": None, "said": "to do"})
        seconds = "" if row["seconds"] is None else f"{row['seconds']:,.0f}"
        said = str(row["said"] or "").partition(": ")[2] or row["said"] or ""
        lines.append(f"| {step.name} | {step.recipe} | {seconds} | {said} |")
    return "\n".join(lines) + "\n"


def make(step: Step, ranks: int, state: State) -> None:
    """Run a step in a process of its own, and keep how it ended.

    Raises:
        FailedRun: it failed.
        InterruptedRun: it was told to end, and saved.
    """
    begin = time.monotonic()
    code, said = _started(step, ranks)
    if code == INTERRUPTED:
        raise InterruptedRun(f"interrupted: {step.name} has saved what it had")
    if code == INTERRUPTED_BY_USER:
        raise KeyboardInterrupt
    if code:
        why = "refused" if code == BAD_INPUT else "failed"
        raise FailedRun(f"{step.name} {why} with exit code {code}; see {step.directory}")
    state.end(step.name, said, time.monotonic() - begin)


def _started(step: Step, ranks: int) -> tuple[int, str]:
    """Run a step to its end; its exit code and closing line. What it writes goes to stderr."""
    line, dies_of = _launched(step, ranks)
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    process = subprocess.Popen(
        line,
        env=with_package(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: _die_with_parent(dies_of),
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    try:
        for number in before:
            signal.signal(number, pass_on)
        assert process.stdout is not None
        last, said = step.recipe, step.recipe  # the closing line comes before the path of the result
        for text in process.stdout:
            print(text, end="", file=sys.stderr, flush=True)
            last, said = text.strip(), last
        return process.wait(), said
    except KeyboardInterrupt:
        return _after_interrupt(process), ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _after_interrupt(process: "subprocess.Popen[str]") -> int:
    """Ctrl-C reaches the step too, as it is in the same foreground group; where it does not, it is told."""
    process.send_signal(signal.SIGINT)
    process.wait()
    return INTERRUPTED_BY_USER


def _launched(step: Step, ranks: int) -> tuple[list[str], int]:
    """The command of a step, and the signal that is to end it where the pipeline dies."""
    if ranks == 1:
        return command(step), signal.SIGKILL
    root = Path(__file__).resolve().parents[3]
    launcher = [str(root / "launchers" / "local.sh"), "--nproc", str(ranks)]
    return [*launcher, str(root / "recipes" / f"{step.recipe}.py"), *step.overrides], signal.SIGTERM


def _die_with_parent(number: int) -> None:
    """A killed pipeline leaves no step at work, which would hold the directory that the next start needs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
