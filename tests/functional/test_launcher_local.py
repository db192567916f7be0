"""launchers/local.sh with small recipes that need no model: what it passes on, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Phase 1 as every recipe does it, then RANKS, the part that a test is about.
RECIPE = """
import os, pathlib, signal, subprocess, sys, time
if os.environ.get("NEMO_MINITRON_PREPARE") == "1":
    print("composing for", os.environ["NEMO_MINITRON_NPROC"], sys.argv[1:])
    run = pathlib.Path(os.environ["TEST_RUN"])
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text("a: 1")
    print(run)
    sys.exit(0)
rank = int(os.environ["RANK"])
run = pathlib.Path(sys.argv[sys.argv.index("--config-path") + 1])
"""


def alive(marker: str) -> list[str]:
    """Command lines of the live processes that carry the marker in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # it ended, or is another user's
    return found


class Launch:
    """One launch, known to all of its processes by a variable in the environment."""

    def __init__(self, directory: Path, ranks: str, nproc: int = 2, **env: str) -> None:
        self.run = directory / "run 1, lr=0.1"  # characters that mean something to Hydra
        self.recipe = directory / "recipe.py"
        self.recipe.write_text(RECIPE + ranks)
        self.marker = f"TEST_RUN={self.run}"
        self.process = subprocess.Popen(
            [ROOT / "launchers" / "local.sh", "--nproc", str(nproc), self.recipe, "x=1"],
            env={**os.environ, "NEMO_MINITRON_PYTHON": sys.executable, "TEST_RUN": str(self.run), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; by then no process of the launch may be left."""
        try:
            stdout, stderr = self.process.communicate(timeout=240)
        finally:
            self.process.kill()
        assert alive(self.marker) == []
        return self.process.returncode, stdout, stderr

    def wait_for(self, *names: str) -> None:
        """Waits until the ranks have written these files."""
        deadline = time.monotonic() + 240
        while not all((self.run / name).exists() for name in names):
            assert time.monotonic() < deadline, f"none of {names}: {os.listdir(self.run.parent)}"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)


def test_ranks_meet_and_rank_0_speaks(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path,
        """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("of rank", rank, file=sys.stderr)
print("sum", total.item(), "of", dist.get_world_size(), os.environ["OMP_NUM_THREADS"], sys.argv[3:])
print(run / f"result.json.{rank}")
dist.destroy_process_group()
""",
        OMP_NUM_THREADS="1",
    )
    code, stdout, stderr = launch.end()
    assert code == 0, stderr
    first, last = stdout.splitlines()
    assert first.startswith("sum 3.0 of 2 1 ['--config-name', 'resolved', \"hydra.run.dir='")
    assert last == str(launch.run / "result.json.0")
    assert "composing for 2 ['x=1']" in stderr
    assert "of rank 0" in stderr
    assert "of rank 1" not in stderr
    assert (launch.run / "logs" / "rank1.stderr.log").read_text().endswith("of rank 1\n")
    assert (launch.run / "logs" / "rank1.stdout.log").read_text().splitlines()[-1].endswith("json.1")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [launch.run.name]


@pytest.mark.slow
def test_hydra_takes_the_prepared_configuration(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path,
        """
import hydra
from hydra.core.hydra_config import HydraConfig
@hydra.main(version_base="1.3", config_path=None)
def main(config):
    print(config.a, HydraConfig.get().run.dir)
main()
""",
        nproc=1,
    )
    code, stdout, stderr = launch.end()
    assert code == 0, stderr
    assert stdout == f"1 {launch.run}\n"


@pytest.mark.parametrize("failing", [0, 1])
def test_the_failing_rank_s_code_and_traceback(tmp_path: Path, failing: int) -> None:
    launch = Launch(
        tmp_path,
        f"""
child = subprocess.Popen(["sleep", "600"])
if rank == {failing}:
    time.sleep(0.5)
    print("ValueError: rank", rank, "has the cause", file=sys.stderr)
    sys.exit(7)
time.sleep(600)
""",
    )
    code, stdout, stderr = launch.end()
    assert code == 7
    assert stdout == ""
    assert stderr.count(f"ValueError: rank {failing} has the cause") == 1
    assert f"rank {failing} failed with exit code 7" in stderr


def test_the_cause_is_told_from_its_consequence(tmp_path: Path) -> None:
    """Rank 1 fails; rank 0 waits for it in a collective and fails of that within milliseconds."""
    launch = Launch(
        tmp_path,
        """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
try:
    if rank == 1:
        print("no such layer", file=sys.stderr, flush=True)
        os._exit(2)
    dist.all_reduce(torch.zeros(1))
except RuntimeError:
    print("lost the peer", file=sys.stderr, flush=True)
    os._exit(1)
""",
    )
    code, _, stderr = launch.end()
    assert code == 2
    assert "lost the peer" in stderr
    assert "no such layer" in stderr
    assert "rank 1 failed with exit code 2" in stderr


def test_a_rank_that_dies_of_a_signal(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)")
    code, _, stderr = launch.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed with exit code 137" in stderr


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    """Two ranks that are both stopped were suspended by somebody, and go on; one that is, keeps the other waiting."""
    launch = Launch(
        tmp_path,
        """
(run / f"pid.{rank}.part").write_text(str(os.getpid()))
(run / f"pid.{rank}.part").rename(run / f"pid.{rank}")
time.sleep(600)
""",
        NEMO_MINITRON_STOPPED_S="2",
    )
    launch.wait_for("pid.0", "pid.1")
    pids = [int((launch.run / f"pid.{rank}").read_text()) for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in pids:
        assert "State:\tT" in Path(f"/proc/{pid}/status").read_text()
        os.kill(pid, signal.SIGCONT)
    os.kill(pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    code, _, stderr = launch.end()
    # 2 s, a second between two looks, the 10 s of the others' SIGTERM; the rest is a loaded machine's.
    assert time.monotonic() - begin < 60
    assert code == 128 + signal.SIGKILL
    assert f"rank 1 (process {pids[1]}) was stopped for" in stderr
    assert "rank 1 failed with exit code 137" in stderr


@pytest.mark.parametrize("code", [1, 2])
def test_a_refused_configuration_starts_no_rank(tmp_path: Path, code: int) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"import sys; print('ffn_hidden_size=7: odd', file=sys.stderr); sys.exit({code})")
    command = [ROOT / "launchers" / "local.sh", "--nproc", "2", recipe]
    env = {**os.environ, "NEMO_MINITRON_PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "ffn_hidden_size=7: odd\n")


WAITING = """
def handle(number, frame):
    (run / f"got.{number}.{rank}").touch()
    if number != signal.SIGUSR1:
        sys.exit(5 if rank == 0 else 0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, handle)
(run / f"ready.{rank}").touch()
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    launch = Launch(tmp_path, WAITING)
    launch.wait_for("ready.0", "ready.1")
    launch.process.send_signal(signal.SIGUSR1)
    launch.wait_for(f"got.{int(signal.SIGUSR1)}.0", f"got.{int(signal.SIGUSR1)}.1")
    launch.process.send_signal(number)
    code, _, _ = launch.end()
    assert code == 5
    assert (launch.run / f"got.{int(number)}.0").exists()
    assert (launch.run / f"got.{int(number)}.1").exists()


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], start_new_session=True)
(run / f"ready.{rank}").touch()
time.sleep(600)
"""


def test_ranks_that_ignore_the_end_are_killed(tmp_path: Path) -> None:
    launch = Launch(tmp_path, STUBBORN, NEMO_MINITRON_GRACE_S="1")
    launch.wait_for("ready.0", "ready.1")
    launch.process.terminate()
    code, _, _ = launch.end()
    assert code == 128 + signal.SIGKILL


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    launch = Launch(tmp_path, WAITING)
    launch.wait_for("ready.0", "ready.1")
    launch.process.kill()
    launch.process.wait()
    deadline = time.monotonic() + 120
    while alive(launch.marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(launch.marker) == []
    launch.process.communicate()


def test_a_signal_ends_the_preparation(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import pathlib, time; pathlib.Path(__file__ + '.ready').touch(); time.sleep(600)")
    command = [ROOT / "launchers" / "local.sh", "--nproc", "2", recipe]
    marker = f"TEST_RUN={tmp_path}"
    env = {**os.environ, "NEMO_MINITRON_PYTHON": sys.executable, "TEST_RUN": str(tmp_path)}
    process = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 120
    while not Path(f"{recipe}.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert alive(marker) == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["recipes/prune.py"], "--nproc"),
        (["--nproc", "two", "README.md"], "'two'"),
        (["--nproc", "0", "Makefile"], "--nproc 0"),
        (["--nproc", "2", "recipes/none.py"], "recipes/none.py"),
        (["--nproc", "2", "--nodes", "2", "Makefile"], "--nodes"),
        (["--nproc", "2", "--", "Makefile", "-m"], "-m"),
        (["--nproc", "2", "--nnodes", "2", "--node-rank", "2", "Makefile"], "--node-rank 2"),
        (["--nproc", "2", "--nnodes", "2", "Makefile"], "--rdzv-endpoint"),
        (["--nproc", "2", "--prepared", "runs/x", "Makefile", "a=1"], "runs/x"),
    ],
)
def test_usage_errors(arguments: list[str], names: str) -> None:
    env = {**os.environ, "NEMO_MINITRON_PYTHON": sys.executable}
    command = [ROOT / "launchers" / "local.sh", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert names in done.stderr


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    """Both on this host: prepared once, each starts its half of the ranks."""
    run, recipe = tmp_path / "run", tmp_path / "recipe.py"
    recipe.write_text(
        RECIPE
        + """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print(rank, total.item(), os.environ["NEMO_MINITRON_NPROC"])
dist.destroy_process_group()
"""
    )
    env = {**os.environ, "NEMO_MINITRON_PYTHON": sys.executable, "TEST_RUN": str(run)}
    launcher = [ROOT / "launchers" / "local.sh", "--nproc", "1", "--nnodes", "2"]
    done = subprocess.run(
        [*launcher, "--prepare-only", recipe], env=env, stdout=subprocess.PIPE, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, f"{run}\n")
    meet = ["--prepared", str(run), "--rdzv-endpoint", f"localhost:{free_port()}"]
    nodes = [
        subprocess.Popen(
            [*launcher, *meet, "--node-rank", str(node), recipe], env=env, stdout=subprocess.PIPE, text=True
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert outputs == ["0 3.0 2\n", ""]
    assert (run / "logs" / "rank1.stdout.log").read_text() == "1 3.0 2\n"


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow  # 10 s of waiting
@pytest.mark.alone
def test_a_dead_rank_ends_the_others_in_time(tmp_path: Path) -> None:
    """Rank 0 waits in a collective that would take ten minutes to time out, and does not listen to SIGTERM."""
    launch = Launch(
        tmp_path,
        """
import datetime, torch, torch.distributed as dist
signal.signal(signal.SIGTERM, signal.SIG_IGN)
dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
(run / f"pid.{rank}").write_text(str(os.getpid()))
dist.barrier()
if rank == 1:
    (run / "dies").touch()
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
""",
    )
    launch.wait_for("dies")
    # The promise is 30 s: those left are killed after 10.
    left, give_up = Path("/proc") / (launch.run / "pid.0").read_text(), time.monotonic() + 30
    while left.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not left.exists()
    code, _, stderr = launch.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed with exit code 137" in stderr


def test_more_ranks_than_cores_is_a_warning(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE + "print(os.environ['OMP_NUM_THREADS'])")
    run = tmp_path / "run"
    command = [ROOT / "launchers" / "local.sh", "--nproc", "2", recipe]
    env = {**os.environ, "NEMO_MINITRON_PYTHON": sys.executable, "TEST_RUN": str(run)}
    env.pop("OMP_NUM_THREADS", None)
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "warning: 2 ranks share 1 cores" in done.stderr
