"""Where the study's runs lie, what each is made of, and how one is carried out.

A run has HOME/STUDY/seed-N/NAME, its output NAME.log and its record NAME.json beside it: what it was made of, and the
seconds that all its starts took. It is finished as any run of a recipe is, when its result.json is there.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.rows import ROOT, Row, Run, Study
from nemo_minitron.environment import INTERRUPTED, INTERRUPTED_BY_USER, LAUNCHED_BY, RESULT, with_package
from nemo_minitron.errors import FailedRun, InputError, InterruptedRun
from nemo_minitron.files import read_text, write_text


class Home:
    """The runs of one study."""

    def __init__(self, place: Path, study: Study, teacher_sha256: str, more: Sequence[str] = ()) -> None:
        """`teacher_sha256`: of the study's teacher, a part of what runs are made of. `more`: typed for every run."""
        self.place, self.study = place.absolute() / study.name, study
        self.teacher_sha256, self.more = teacher_sha256, tuple(more)
        self._at_work: set[subprocess.Popen[bytes]] = set()

    def directory(self, run: Run, seed: int) -> Path:
        """A run's."""
        return self.place / f"seed-{seed}" / run.name

    def typed(self, run: Run, seed: int) -> list[str]:
        """What stands after the recipe, but for `run_dir`; other runs are @NAME."""
        seeds = [f"seed={seed}", f"data.seed={seed}"]
        if run.recipe == "prune":
            seeds.append(f"prune.seed={seed}")
        return [*run.overrides, *self.study.common, *seeds, *self.more]

    def command(self, run: Run, seed: int) -> list[str]:
        """A run's command line."""
        typed = []
        for text in self.typed(run, seed):
            key, at, name = text.partition("=@")
            typed.append(f"{key}={self.directory(self.study.runs[name], seed)}" if at else text)
        recipe = str(ROOT / "recipes" / f"{run.recipe}.py")
        return [sys.executable, recipe, *typed, f"run_dir={self.directory(run, seed)}"]

    def result(self, run: Run, seed: int) -> dict[str, Any] | None:
        """Of a finished run; None of one that is not.

        Raises:
            InputError: what lies there was made of something else.
        """
        self._check(run, seed)
        file = self.directory(run, seed) / RESULT
        return dict(json.loads(read_text(file))) if file.is_file() else None

    def record(self, run: Run, seed: int) -> dict[str, Any]:
        """`made_of`, `cpu_s` and `wall_s` of all starts so far; empty before the first."""
        file = self._record_file(run, seed)
        return dict(json.loads(read_text(file))) if file.is_file() else {}

    def wanted(self, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[tuple[Run, int]]:
        """All runs of the rows, each after those that it needs; one seed after the other."""
        for seed in seeds:
            seen: set[str] = set()
            for row in rows:
                for run in self.study.runs_of(row):
                    if run.name not in seen:
                        seen.add(run.name)
                        yield run, seed

    def carry_out(self, run: Run, seed: int) -> dict[str, Any]:
        """Run what is not finished, or go on with it. Returns its result.

        Raises:
            InputError: what lies there was made of something else.
            FailedRun: it failed, or a run that it needs is not there.
            InterruptedRun: it was told to end.
        """
        if (found := self.result(run, seed)) is not None:
            return found
        for name in run.needs:
            if self.result(self.study.runs[name], seed) is None:
                raise FailedRun(f"not begun, {name} is not there")
        record = {"made_of": self._made_of(run, seed), "cpu_s": 0.0, "wall_s": 0.0, **self.record(run, seed)}
        self._log(run, seed).parent.mkdir(parents=True, exist_ok=True)
        write_text(self._record_file(run, seed), json.dumps(record, indent=2) + "\n")
        begin = time.monotonic()
        code, cpu_s = self._started(run, seed)
        record["wall_s"] += round(time.monotonic() - begin, 1)
        record["cpu_s"] += round(cpu_s, 1)
        write_text(self._record_file(run, seed), json.dumps(record, indent=2) + "\n")
        if code in (INTERRUPTED, INTERRUPTED_BY_USER):
            raise InterruptedRun(f"{run.name} was told to end")
        if (made := self.result(run, seed)) is None or code:
            raise FailedRun(f"exit code {code}, see {self._log(run, seed)}")
        return made

    def interrupt(self) -> None:
        """Tell all that is at work to end; a terminal's Ctrl-C has reached it already."""
        for process in list(self._at_work):
            process.send_signal(signal.SIGINT)

    def _started(self, run: Run, seed: int) -> tuple[int, float]:
        """Run a recipe to its end, its output in its log; the exit code and the CPU seconds of it and its children."""
        line = self.command(run, seed)
        with open(self._log(run, seed), "a") as log:
            print(shlex.join(line), file=log, flush=True)
            # A killed study leaves no run at work, which would hold the directory that the next start needs.
            environment = with_package(**{LAUNCHED_BY: str(os.getpid())})
            process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
            self._at_work.add(process)
            try:
                _, status, used = os.wait4(process.pid, 0)
            finally:
                self._at_work.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, used.ru_utime + used.ru_stime

    def _made_of(self, run: Run, seed: int) -> list[str]:
        return [run.recipe, *self.typed(run, seed), f"teacher {self.teacher_sha256}"]

    def _check(self, run: Run, seed: int) -> None:
        before, now = self.record(run, seed).get("made_of"), self._made_of(run, seed)
        if before is None and (self.directory(run, seed) / RESULT).exists():
            raise InputError(
                f"--home {self.place.parent}: {self.directory(run, seed)} was made by no study; choose another --home"
            )
        if before is not None and before != now:
            other = [text for text in before if text not in now] or before
            raise InputError(
                f"--home {self.place.parent}: {self.directory(run, seed)} was made with {' '.join(other)}; choose "
                "another --home, or say the same again"
            )

    def _record_file(self, run: Run, seed: int) -> Path:
        return self.directory(run, seed).with_name(f"{run.name}.json")

    def _log(self, run: Run, seed: int) -> Path:
        return self.directory(run, seed).with_name(f"{run.name}.log")
