"""What every recipe gets from its runner: run directories, sweeps, values as typed, Ctrl-C, the last lines.

The recipe here has no model, so that each command costs a second; the real ones go through the same code.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.commands import ROOT
from tests.support.slurm_cluster import TINY

TEACHER = ROOT / "assets" / "demo-teacher"
SAYS = (
    'return {"recipe": "tiny", "params": 3640000, "seed": r.prune.seed, "source": r.source, '
    '"overwrite": r.overwrite}'
)
# As long work does: in steps, which ask whether Ctrl-C came. Its exception may be lost in C code.
WAITS = (
    "from nemo_minitron.progress import end_if_asked; naps = 6000 if r.prune.seed == 1 else 0; "
    "(directory / 'ready').touch(); [end_if_asked() or time.sleep(0.1) for _ in range(naps)]"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY.replace("WORK", SAYS))
    return path


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NEMO_MINITRON_") and k != "RANK"}
    return {**kept, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", **more}


def run(
    recipe: Path, *typed: str, python: str = sys.executable, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, str(recipe), "prune=width", *typed],
        cwd=recipe.parent,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=240,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_end_of_a_run_and_what_it_leaves(tiny: Path) -> None:
    done = run(tiny, "prune.seed=7")
    assert done.returncode == 0, done.stderr
    numbers, path = done.stdout.splitlines()
    assert numbers == "tiny: 3.64M parameters"
    found = re.fullmatch(r"(.*/outputs/prune/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d)/result\.json", path)
    assert found
    assert sorted(p.name for p in Path(found[1]).iterdir()) == [
        ".lock",
        "config.yaml",
        "cpu_products.json",
        "result.json",
    ]
    text = Path(found[1], "config.yaml").read_text()
    assert text.startswith("# python recipes/prune.py prune=width prune.seed=7\n# nemo_minitron ")
    config = yaml.safe_load(text)
    assert (config["prune"]["seed"], config["data"]["seq_length"]) == (7, 512)
    assert config["run_dir"] == str(Path(found[1]).relative_to(tiny.parent))


def test_a_finished_run_stays_as_it_is_when_a_command_is_refused(tiny: Path) -> None:
    first = tiny.parent / "run"
    assert run(tiny, f"run_dir={first}", "data.seq_length=256").returncode == 0
    before = contents(first)
    assert "overwrite=true" in refusal(run(tiny, f"run_dir={first}", "data.seq_length=128"))
    # What is refused only after it was let in has not touched it either.
    assert "data.seq_length=1" in refusal(
        run(tiny, f"run_dir={first}", "overwrite=true", "data.seq_length=1")
    )
    assert contents(first) == before
    assert run(tiny, f"run_dir={first}", "data.seq_length=128", "overwrite=true").returncode == 0
    assert yaml.safe_load((first / "config.yaml").read_text())["data"]["seq_length"] == 128
    assert json.loads((first / "result.json").read_text())["overwrite"] is True


def test_a_refused_command_leaves_nothing(tiny: Path) -> None:
    for typed, says in {
        ("prune.hidden=3",): "prune.hidden",
        ("data.seq_length=1",): "data.seq_length=1",
        ("student=x",): "student=x: prune has no use for student; it takes source, prune",
        ("hydra.run.dir=elsewhere",): "say run_dir=elsewhere",
        ("+conf=no_such",): "no_such",
    }.items():
        assert says in refusal(
            run(tiny, *typed, *(["run_dir=fresh/a/b"] if typed[0] != "+conf=no_such" else []))
        )
    assert list(tiny.parent.iterdir()) == [tiny]


def test_a_run_directory_that_cannot_be_made(tiny: Path) -> None:
    (tiny.parent / "file").write_text("in the way")
    (tiny.parent / "link").symlink_to("nowhere/at/all")
    before = sorted(tiny.parent.iterdir())
    ours = "cannot be made or written in ("
    for bad, says in {
        "file": ours,
        "file/below": ours,
        "/proc/of-nobody/x": ours,
        "d/" * 2030 + "e": ours,  # short enough itself, too long from the root
        "x" * 300 + "/y": "at most 255 bytes",
        "d/" * 2500 + "e": "at most 4096 characters",
    }.items():
        line = refusal(run(tiny, f"run_dir={bad}"))
        assert f"run_dir={bad[:20]}" in line
        assert says in line
        assert len(line) < 400
    assert sorted(tiny.parent.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a directory immutable")
def test_an_immutable_directory(tiny: Path) -> None:
    home = tiny.parent / "immutable"
    home.mkdir()
    if subprocess.run(["chattr", "+i", str(home)], capture_output=True).returncode:
        pytest.skip("this file system has no immutable directories")
    try:
        assert "Operation not permitted" in refusal(run(tiny, f"run_dir={home}/run"))
    finally:
        subprocess.run(["chattr", "-i", str(home)], check=True)


def test_values_arrive_as_typed(tiny: Path) -> None:
    """The shell hands over `~` after `=`, accents, spaces, `=`, `#` and quotes; pynvml's warning is not shown."""
    work = tiny.read_text().replace(SAYS, f"import torch, warnings; warnings.simplefilter('default'); {SAYS}")
    (tiny.parent / "torch_too.py").write_text(work)
    name = "été a=b #1 it's"
    done = run(
        tiny.parent / "torch_too.py", f"run_dir=~/{name}", f"source=~/modèle {name}", HOME=str(tiny.parent)
    )
    assert done.returncode == 0, done.stderr
    assert "pynvml" not in done.stderr
    result = tiny.parent / name / "result.json"
    assert done.stdout.splitlines()[-1] == str(result)
    assert json.loads(result.read_text())["source"] == f"{tiny.parent}/modèle {name}"


def test_a_sweep_has_a_run_for_each_configuration(tiny: Path) -> None:
    done = run(tiny, "-m", "prune.seed=3,4")
    assert done.returncode == 0, done.stderr
    found = sorted((tiny.parent / "multirun").rglob("result.json"))
    assert [path.parent.name for path in found] == ["0", "1"]
    assert [json.loads(path.read_text())["seed"] for path in found] == [3, 4]
    configs = [yaml.safe_load((path.parent / "config.yaml").read_text()) for path in found]
    assert [config["prune"]["seed"] for config in configs] == [3, 4]
    assert [line for line in done.stdout.splitlines() if "result.json" in line] == [
        str(path) for path in found
    ]

    mine = tiny.parent / "my é=sweep"
    assert run(tiny, "-m", f"run_dir={mine}", "prune.seed=5,6").returncode == 0
    assert [json.loads((mine / n / "result.json").read_text())["seed"] for n in "01"] == [5, 6]
    # The second configuration is refused: the first one's result stays, and the exit code tells.
    done = run(tiny, "-m", f"run_dir={mine}2", "data.seq_length=64,1,32")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: data.seq_length=1: ")
    assert sorted(path.name for path in Path(f"{mine}2").iterdir()) == ["0", "multirun.yaml"]


def waiting(recipe: Path, *command: str) -> tuple["subprocess.Popen[str]", Path]:
    """A recipe that has begun its work, and its run directory."""
    recipe.write_text(TINY.replace("WORK", f"{WAITS}; {SAYS}"))
    run_dir = recipe.parent / "run"
    process = subprocess.Popen(
        [*command, str(recipe), "prune=width", f"run_dir={run_dir}", "prune.seed=1"],
        cwd=recipe.parent,
        env=environment(NEMO_MINITRON_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 240
    while not (run_dir / "ready").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.1)
    return process, run_dir


def test_ctrl_c_is_one_line_and_the_command_can_be_repeated(tiny: Path) -> None:
    process, run_dir = waiting(tiny, sys.executable)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    (line,) = stderr.strip().splitlines()
    assert line == f"interrupted: {run_dir} keeps what was finished; the same command goes on from there"
    assert not (run_dir / "result.json").exists()
    assert run(tiny, f"run_dir={run_dir}", "prune.seed=2").returncode == 0


def test_ctrl_c_under_the_launcher(tiny: Path) -> None:
    process, run_dir = waiting(tiny, str(ROOT / "launchers" / "local.sh"), "--nproc", "1")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert [line for line in stderr.splitlines() if line.strip()] == [
        f"interrupted: {run_dir} keeps what was finished; the same command with run_dir={run_dir} goes on from there"
    ]
    assert not (run_dir / ".hydra").exists()


def test_the_package_runs_recipes_by_name(tmp_path: Path) -> None:
    def module(*typed: str) -> subprocess.CompletedProcess[str]:
        return run_module(tmp_path, *typed)

    listed = module()
    assert listed.returncode == 0, listed.stderr
    for recipe in ROOT.glob("recipes/*.py"):
        assert f"  {recipe.stem} " in listed.stdout, "add it to nemo_minitron.run.commands.RECIPES"
    assert "must be one of pretrain, prune" in refusal(module("prunes"))
    assert "say run_dir=x" in refusal(module("prune", "hydra.run.dir=x"))
    explained = module("prune", "+conf=width", "--help")
    assert explained.returncode == 0, explained.stderr
    for part in (
        "prune: load, score, plan, prune",  # of the module
        "python recipes/prune.py +conf=width",  # of conf/
        "`control_seeds`: how many times",  # of the schema
        "  hidden_size: 3/4",  # as composed
    ):
        assert part in explained.stdout
    assert list(tmp_path.iterdir()) == []


def run_module(cwd: Path, *typed: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "nemo_minitron", *typed],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


BASE = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"
BARE = BASE.exists() and bool(
    subprocess.run([str(BASE), "-c", "import hydra"], capture_output=True, env=environment()).returncode
)


@pytest.mark.skipif(not BARE, reason="the interpreter below the environment has Hydra itself")
def test_a_plain_interpreter_goes_on_with_the_environment_s(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "prune.py"
    nowhere = run(recipe, "prune.hidden=3", python=str(BASE), NEMO_MINITRON_HOME=str(tmp_path), PYTHONPATH="")
    assert "make setup" in refusal(nowhere)
    found = subprocess.run(
        [str(ROOT / "scripts" / "environment.sh"), "find"], capture_output=True, text=True, env=environment()
    )
    if found.returncode:
        pytest.skip("no environment of this clone")
    done = run(recipe, "prune.hidden=3", python=str(BASE), PYTHONPATH="")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.endswith(f": going on with {found.stdout.strip()}")
    assert second.startswith("error: ")
    assert "prune.hidden" in second
