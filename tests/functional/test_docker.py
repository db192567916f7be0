"""The image and the command line that runs it; no engine is needed."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.commands import ROOT

DOCKERFILE = ROOT / "launchers" / "docker" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER", "LABEL", "ENTRYPOINT", "CMD"}
# What the image's own CUDA build is.
KEPT = ("torch", "transformer", "apex", "megatron", "nemo_toolkit", "nemo-toolkit", "flash", "triton")


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def pins() -> dict[str, str]:
    """constraints.txt by normalised name."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_dockerfile_is_well_formed() -> None:
    found = instructions()
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0] == ("ARG", "BASE=nvcr.io/nvidia/nemo:25.07")
    assert found[1] == ("FROM", "${BASE}")
    assert [word for word, _ in found].count("FROM") == 1
    (shell,) = [rest for word, rest in found if word == "SHELL"]
    assert "pipefail" in shell  # a pipe's first command may fail too
    assert all(rest.startswith("/") for word, rest in found if word == "WORKDIR")
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, timeout=60)


def test_the_image_s_own_builds_stay() -> None:
    """pip installs without dependencies, in the versions of constraints.txt, and nothing that the image has built."""
    runs = " && ".join(rest for word, rest in instructions() if word == "RUN")
    assert not re.search(r"(?<!-m )\bpip3? (install|list)", runs)  # another interpreter's, perhaps
    installs = [shlex.split(part) for part in runs.split("&&") if re.search(r"pip install", part)]
    assert installs
    for install in installs:
        assert {"--no-deps", "--no-cache-dir"} <= set(install)
        packages = [word for word in install[install.index("install") + 1 :] if not word.startswith("-")]
        assert packages
        for package in packages:
            name, _, version = package.partition("==")
            assert not name.startswith(KEPT), name
            assert pins()[name] == version
    # and the build stops if one of them changed all the same
    assert "diff /tmp/before /tmp/after" in runs


def docker(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "launchers" / "docker.sh", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def flags(command: list[str], name: str) -> list[str]:
    return [value for flag, value in pairwise(command) if flag == name]


def test_the_command_line(tmp_path: Path) -> None:
    command = ["launchers/local.sh", "--nproc", "2", "recipes/prune.py", "run_dir=a b"]
    done = docker("--dry-run", "--mount", f"{tmp_path}:/data:ro", *command, cwd=tmp_path, HF_HOME="/hf")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["docker", "run"]
    assert words[-len(command) - 1 :] == ["nemo_minitron:25.07", *command]
    assert flags(words, "--gpus") == ["all"]
    assert flags(words, "--ulimit") == ["memlock=-1", "stack=67108864"]
    assert any(word.startswith("--shm-size=") for word in words)
    assert flags(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert flags(words, "--workdir") == [str(tmp_path)]
    mounted = {f"{ROOT}:{ROOT}", f"{tmp_path}:{tmp_path}", f"{tmp_path}:/data:ro", "/hf:/hf"}
    assert set(flags(words, "--volume")) == mounted
    assert f"PYTHONPATH={ROOT}" in flags(words, "--env")
    assert "--gpus" not in shlex.split(docker("--dry-run", "--gpus", "none", "true").stdout)


def test_the_caches_are_the_user_s_before_they_are_mounted(tmp_path: Path) -> None:
    """docker itself would make them root's. Instead of docker: what lists the directory."""
    (tmp_path / "docker").write_text('#!/bin/sh\nls -d "$HF_HOME"\n')
    (tmp_path / "docker").chmod(0o755)
    cache = tmp_path / "not" / "yet"
    done = docker("true", cwd=tmp_path, HF_HOME=str(cache), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, f"{cache}\n"), done.stderr


def test_a_campaign_that_cannot_build_says_so(tmp_path: Path) -> None:
    """tests/image_campaign.py, without buildah or without root: a line, and an exit code that is not 0."""
    command = [sys.executable, "-m", "tests.image_campaign", "--home", str(tmp_path / "home")]
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 77, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "needs root" in done.stdout or "apt-get install" in done.stdout
    assert not (tmp_path / "home").exists()


def test_the_build() -> None:
    words = shlex.split(docker("--dry-run", "--base", "nvcr.io/nvidia/nemo:25.04", "build").stdout)
    assert words[:2] == ["docker", "build"]
    assert flags(words, "--build-arg") == ["BASE=nvcr.io/nvidia/nemo:25.04"]
    assert flags(words, "--file") == [str(DOCKERFILE)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to run"),
        (["--gpu", "2", "true"], "--gpu: no such option"),
        (["--gpus", "some", "true"], "--gpus some"),
        (["--mount", "/nowhere:/x", "true"], "/nowhere is not here"),
        (["--mount", "/tmp", "true"], "SRC:DST"),
        (["--image"], "--image: needs a value"),
    ],
)
def test_refused(arguments: list[str], says: str) -> None:
    done = docker(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
