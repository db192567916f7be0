"""launchers/slurm.sh --dry-run and what it refuses; no SLURM is needed. test_slurm.py runs a real one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.commands import ROOT


def launch(
    *arguments: str, cwd: Path, program: tuple[object, ...] = (ROOT / "launchers" / "slurm.sh",), **env: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*map(str, program), *arguments],
        cwd=cwd,
        env={**os.environ, "NEMO_MINITRON_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def options_of(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def configuration(printed: str) -> dict[str, dict[str, object]]:
    """What --dry-run shows of job.yaml, below the line that names it."""
    return yaml.safe_load(re.sub("^# ?", "", printed.partition("/job.yaml\n")[2], flags=re.MULTILINE))


def test_the_paper_s_distillation(tmp_path: Path) -> None:
    """arXiv 2408.11796, table 4: batch 1152, length 8192, learning rate 1e-4 to 1e-5; on 32 nodes of 8 GPUs."""
    recipe = str(ROOT / "recipes" / "distill.py")
    done = launch("--dry-run", recipe, "+conf=llama31_8b/width", "+cluster=slurm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"--nodes=32", "--ntasks-per-node=8", "--gpus-per-node=8", "--job-name=distill"} <= set(
        options_of(done.stdout)
    )
    config = configuration(done.stdout)
    assert config["trainer"]["tensor_model_parallel_size"] == 8
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["distill"]["global_batch_size"] == config["trainer"]["global_batch_size"] == 1152
    assert config["data"]["seq_length"] == 8192
    optim = config["distill"]["optim"]
    assert isinstance(optim, dict)
    assert (optim["lr"], optim["min_lr"], optim["warmup_steps"]) == (1e-4, 1e-5, 40)
    # What the user has not said yet is shown as such, and is no reason not to look at the job.
    assert config["student"] == "<student>"
    assert "no value yet for student" in done.stderr
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_a_chain_and_a_sweep(tmp_path: Path) -> None:
    """Without +cluster=NAME it is slurm; `@` is the run directory of the job before."""
    prune, distill = (str(ROOT / "recipes" / f"{name}.py") for name in ("prune", "distill"))
    steps = [prune, "+conf=width", "run_dir='a, b'"]
    done = launch(
        "--dry-run", *steps, "--then", distill, "+conf=width", "-m", "student=@", "seed=1,2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "--dependency=afterok:JOB_1" in options_of(done.stdout)
    assert "--array=0-1" in options_of(done.stdout)
    assert done.stdout.count(f"# student: {tmp_path}/a, b\n") == 2
    first, second = re.findall(r"^# run_dir: (.*)$", done.stdout, re.MULTILINE)[1:]
    assert (Path(first).name, Path(second).name) == ("0", "1")
    assert Path(first).parent == Path(second).parent
    assert re.findall(r"^# seed: (\d+)$", done.stdout, re.MULTILINE) == ["1234", "1", "2"]
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_a_cluster_submits(tmp_path: Path) -> None:
    """`python recipes/X.py +cluster=NAME` is the launcher; it stops at what it lacks first, sbatch."""
    command = (sys.executable, ROOT / "recipes" / "prune.py")
    done = launch(
        "+conf=width", "+cluster=slurm", cwd=tmp_path, program=command, PATH=without_sbatch(tmp_path)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch is not on the path" in done.stderr
    assert not (tmp_path / "outputs").exists()


def without_sbatch(directory: Path) -> str:
    """A path with the little that the launcher's shell script needs."""
    (directory / "bin").mkdir()
    for name in ("bash", "env", "dirname"):
        (directory / "bin" / name).symlink_to(Path("/usr/bin") / name)
    return str(directory / "bin")


PRUNE = str(ROOT / "recipes" / "prune.py")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run"], ["recipe"]),
        (["--dryrun", PRUNE], ["--dryrun"]),
        (["--dry-run", "recipes/none.py"], ["recipes/none.py", "no such recipe"]),
        (["--dry-run", PRUNE, "--then"], ["--then", "no such recipe"]),
        (["--after", "12x", PRUNE], ["--after 12x", "number"]),
        (["--dry-run", PRUNE, "source=@"], ["source=@", "no single job before"]),
        (["--dry-run", PRUNE, "+cluster=slurmm"], ["slurmm", "slurm_pyxis", "slurm"]),
        (
            ["--dry-run", PRUNE, "+conf=width", "trainer.tensor_model_parallel_size=16"],
            ["trainer.num_nodes=1", "16 ranks on a node of 8 GPUs", "at least 2 nodes"],
        ),
        (
            ["--dry-run", PRUNE, "+cluster=slurm_pyxis", "cluster.container_image=/nowhere.sqsh"],
            ["cluster.container_image=/nowhere.sqsh", "no such file"],
        ),
        (
            ["--dry-run", "-m", PRUNE, "trainer.micro_batch_size=8", "cluster.gpus_per_node=0,8"],
            ["one cluster"],
        ),
    ],
)
def test_refused(arguments: list[str], says: list[str], tmp_path: Path) -> None:
    done = launch(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in says:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- docs/clusters.md --------------------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "clusters.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line.startswith(("launchers/", "python "))
]
# Where the text says DIR, RUN and so on.
STANDS_FOR = {"DIR": str(ROOT / "assets" / "demo-teacher"), "nemo.sqsh": "nvcr.io#nvidia/nemo:25.07"}


@pytest.mark.slow  # seconds each, for the same imports
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("launchers/slurm.sh")])
def test_a_slurm_command_of_the_docs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    for name, value in STANDS_FOR.items():
        words = [re.sub(rf"(?<==){re.escape(name)}$", value, word) for word in words]
    words = [word for word in words if word not in ("--wait", "--dry-run")]
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    done = launch("--dry-run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 1 + words.count("--then")


def test_the_docs_have_the_four_quick_starts() -> None:
    assert len([c for c in COMMANDS if c.startswith("launchers/slurm.sh")]) >= 4
    for part in ("--nproc 2", "--nproc 8", "+cluster=slurm ", "+cluster=slurm_pyxis", "launchers/docker.sh"):
        assert any(part in f"{command} " for command in COMMANDS), part


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("launchers/docker.sh")])
def test_a_docker_command_of_the_docs(command: str) -> None:
    program, *words = shlex.split(command)
    done = launch("--dry-run", *words, cwd=ROOT, program=(ROOT / program,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("docker ")


@pytest.mark.slow  # the model is read once
def test_the_local_commands_of_the_docs(tmp_path: Path) -> None:
    """A laptop's is prepared as it stands; of one for GPUs the configuration is composed."""
    local = [shlex.split(c) for c in COMMANDS if c.startswith("launchers/local.sh")]
    assert [words[2] for words in local] == ["2", "8"]
    for program, *words in local:
        recipe, *overrides = words[2:]
        if words[1] == "2":
            command = [ROOT / program, "--prepare-only", *words[:2], ROOT / recipe, *overrides]
            ends = f"{tmp_path}/outputs/"
        else:
            command = [sys.executable, ROOT / recipe, *overrides, "--cfg", "job", "--resolve"]
            ends = "source: DIR"
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert ends in done.stdout


def test_every_launcher_named_in_the_docs_is_there() -> None:
    for path in set(re.findall(r"\b(?:launchers|recipes|conf|docs|tests|benchmarks)/[\w./-]+\.\w+", DOCS)):
        assert (ROOT / path).exists() or path == "recipes/Y.py", path
