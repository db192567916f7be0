"""Runs recipes as a user types them, and says what came of it."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 64
# Hidden size and heads so that, pruned to 3/4, kv_channels is no longer hidden_size / num_attention_heads.
SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
}
VOCAB_SIZE = 512


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    def result(self) -> dict[str, Any]:
        """The result.json that the last line on stdout names."""
        assert self.code == 0, self.stderr
        path = Path(self.stdout.splitlines()[-1])
        assert path.name == "result.json", self.stdout
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Commands:
    """A user with a home directory and a small corpus: Python's own `email` to train on, `json` held out.

    What was prepared once lies in `cache`, which users may share.
    """

    home: Path
    cache: Path

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HYDRA_FULL_ERROR", "PYTHONPATH")
            and not name.startswith("NEMO_MINITRON_")
        }
        return {
            **inherited,
            "NEMO_MINITRON_HOME": str(self.cache),
            "NEMO_MINITRON_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def data(self) -> list[str]:
        """Overrides that name the corpus."""
        library = Path(os.__file__).parent
        return [
            "data=files",
            f"data.train={library}/email/*.py",
            f"data.valid={library}/json/*.py",
            f"data.vocab_size={VOCAB_SIZE}",
            f"data.seq_length={SEQ_LENGTH}",
            "eval.samples=32",
            "trainer.micro_batch_size=8",
        ]

    def sizes(self) -> list[str]:
        """Overrides that name the teacher's architecture."""
        return [f"model.{name}={value}" for name, value in SIZES.items()]

    def command(self, recipe: str, *overrides: str, nproc: int | None = None) -> list[str]:
        launcher = (
            [str(ROOT / "launchers" / "local.sh"), "--nproc", str(nproc)] if nproc else [sys.executable]
        )
        return [*launcher, str(ROOT / "recipes" / f"{recipe}.py"), *overrides]

    def run(
        self,
        recipe: str,
        *overrides: str,
        nproc: int | None = None,
        env: dict[str, str] | None = None,
        largest_file_bytes: int | None = None,
        timeout: float = 500,
    ) -> Ended:
        """Runs a recipe to its end, from a directory that holds nothing of the repository's."""
        begin = time.monotonic()
        done = subprocess.run(
            self.command(recipe, *overrides, nproc=nproc),
            env=self.environment(**(env or {})),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=_limit(largest_file_bytes) if largest_file_bytes else None,
        )
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)

    def killed(
        self, recipe: str, *overrides: str, log: Path, when: Callable[[str], bool], timeout: float = 300
    ) -> str:
        """What a recipe printed until `when` was true of it and SIGKILL ended it."""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command(recipe, *overrides),
                env=self.environment(PYTHONUNBUFFERED="1"),
                cwd=self.home,
                stdout=output,
                stderr=output,
            )
        try:
            deadline = time.monotonic() + timeout
            while not when(log.read_text(errors="replace")):
                assert process.poll() is None, f"it ended before the moment came: {log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        self.wait_for_orphans()
        return log.read_text(errors="replace")

    def wait_for_orphans(self, timeout: float = 30) -> None:
        """Until nothing runs any more that was started with this user's cache.

        Raises:
            AssertionError: something does, after `timeout` seconds: its command line.
        """
        deadline = time.monotonic() + timeout
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {list(left.values())}"
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """Command lines of what runs with this user's cache, by process id; zombies have none."""
        mark, found = f"NEMO_MINITRON_HOME={self.cache}".encode(), {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        return found

    def ask(self, asked: list[dict[str, Any]], script: str = "refusals.py") -> list[dict[str, Any]]:
        """What comes of recipes that shall be refused, in one process for all; see refusals.py and in_turn.py."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "support" / script)],
            input=json.dumps(asked),
            env=self.environment(PYTHONPATH=str(ROOT)),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refuse(self, recipe: str, cases: dict[str, tuple[list[str], list[str]]]) -> None:
        """Hold that a recipe refuses each case's overrides in a line with each of its texts, without NeMo or a file."""
        before = tree(self.home), tree(self.cache)
        asked = [{"recipe": recipe, "overrides": overrides, "env": {}} for overrides, _ in cases.values()]
        for (name, (_, says)), answer in zip(cases.items(), self.ask(asked), strict=True):
            assert answer["code"] == 2, (name, answer)
            assert not answer["nemo"], name
            lines = answer["err"].splitlines()
            assert lines[-1].startswith("error: "), (name, lines)
            for part in says:
                assert part in lines[-1], (name, lines)
        assert (tree(self.home), tree(self.cache)) == before

    def prune(self, source: Path, run_dir: Path, *overrides: str, **options: Any) -> Ended:
        """recipes/prune.py +conf=width over 32 calibration sequences."""
        return self.run("prune", *self.pruning(source, run_dir), *overrides, **options)

    def pruning(self, source: Path, run_dir: Path) -> list[str]:
        """The overrides of `prune`."""
        common = [*self.data(), "prune.calibration_samples=32", f"source={source}", f"run_dir={run_dir}"]
        return ["+conf=width", *common]

    def pretrain(self, run_dir: Path, *overrides: str, **options: Any) -> Ended:
        """recipes/pretrain.py on the tiny architecture."""
        return self.run("pretrain", *self.pretraining(run_dir), *overrides, **options)

    def pretraining(self, run_dir: Path) -> list[str]:
        """The overrides of `pretrain`."""
        return [*self.data(), *self.sizes(), "optim.warmup_steps=2", f"run_dir={run_dir}"]


def _limit(file_bytes: int) -> Callable[[], None]:
    """Writing a file beyond the limit fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def tree(directory: Path) -> dict[str, str]:
    """Names of everything below a directory but logs, with what tells a change."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if name.endswith(".log"):
            continue
        with contextlib.suppress(OSError):
            stat = path.lstat()
            found[name] = f"{stat.st_mode} {stat.st_size} {stat.st_mtime_ns}"
    return found
