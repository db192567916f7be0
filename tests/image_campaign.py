"""Builds the image by buildah, without a Docker engine, and runs recipes in it as launchers/docker.sh would:

    python -m tests.image_campaign --home DIR [--keep] [--mirror URL]    # from the repository's root

In place of NGC's image stands one that is made here: Debian 12 by debootstrap, and of this environment's packages what
pyproject.toml asks for, but for what the Dockerfile installs. Mounts, user and variables are those that
launchers/docker.sh --dry-run prints to a user who is not root. Needs root, 25 GB of disk, and

    apt-get install --no-install-recommends buildah debootstrap

Exit codes: 0 all well, 1 something is wrong, 77 not run, with one line that says why.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.functional.test_docker import DOCKERFILE, instructions
from tests.support.buildah import BUILD_S, Buildah, translated
from tests.support.commands import ROOT

NOT_RUN = 77
_APT = "apt-get install --no-install-recommends buildah debootstrap"
# Debian's release with the Python of the environment: its packages are taken from it as they are.
_SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
_FREE_GB = 25
_RUN_S = 900
# Nobody in the image's /etc/passwd, like most users of a cluster.
USER = 12345
BARE, BASE, IMAGE = "localhost/bare:base", "localhost/stand_in:base", "localhost/nemo_minitron:built"
_PROBE = """
import json, os, pathlib, resource, sys
import cma, jsonlines, nemo_aligner, nemo_minitron, optuna, torch
try:
    pathlib.Path("/data/new").write_text("")
    written = True
except OSError:
    written = False
print(json.dumps({
    "user": f"{os.getuid()}:{os.getgid()}", "cwd": os.getcwd(), "package": nemo_minitron.__file__,
    "environment": dict(os.environ), "python": sys.executable, "torch": torch.__version__, "data_written": written,
    "data": sorted(os.listdir("/data")), "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "stack": resource.getrlimit(resource.RLIMIT_STACK)[0],
}))
"""


def say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)


def missing(home: Path) -> str | None:
    """Why nothing can be built on this machine."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in ("buildah", "debootstrap", "setpriv", "git") if not shutil.which(tool)]
    if absent:
        return f"no {' and no '.join(absent)} on the path: {_APT}"
    if subprocess.run(["unshare", "--mount", "chroot", "/", "true"], capture_output=True).returncode:
        return "neither chroot nor mounts are allowed here"
    if sys.version_info[:2] not in _SUITES:
        return f"no release of Debian here has Python {sys.version_info.major}.{sys.version_info.minor}"
    free = shutil.disk_usage(next(x for x in home.parents if x.is_dir())).free / 1e9
    return f"{free:.0f} GB of disk are free, {_FREE_GB} are needed" if free < _FREE_GB else None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def of_the_base() -> list[Distribution]:
    """What pyproject.toml asks for, and what that needs, without what the Dockerfile installs."""
    run = next(rest for word, rest in instructions() if word == "RUN")
    installed = {_normal(found) for found in re.findall(r"([\w.-]+)==[\w.]+", run)}
    here = {_normal(found.metadata["Name"]): found for found in distributions()}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    waiting = [(_normal(Requirement(x).name), ("",)) for x in asked]
    taken: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        name, extras = item = waiting.pop()
        if item in taken or name in installed or name not in here:
            continue
        taken.add(item)
        for needed in map(Requirement, here[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((_normal(needed.name), ("", *needed.extras)))
    return [here[name] for name in sorted({name for name, _ in taken})]


def copy_packages(found: Iterable[Distribution], to: Path) -> int:
    """Copies the packages' files into a site-packages directory; how many files. Scripts elsewhere stay behind."""
    files = 0
    for package in found:
        for file in package.files or []:
            if ".." not in file.parts and Path(str(file.locate())).is_file():
                (to / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), to / file)
                files += 1
    return files


def settings_of_pip(root: Path) -> None:
    """pip in the image reaches the index as pip does here."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found = re.findall(r"(?:global|:env:)\.(cert|index-url|trusted-host)='(.*)'", done.stdout)
    (root / "etc" / "pip.conf").write_text(
        "\n".join(["[global]", *(f"{a} = {b}" for a, b in dict(found).items()), ""])
    )
    for name, value in found:
        if name == "cert":
            (root / value.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(value, root / value.lstrip("/"))


def make_base(buildah: Buildah, mirror: list[str], began: float) -> None:
    """Two images: Debian with an empty virtual environment, and that with the packages."""
    container = buildah("from", "--name=base", "scratch")
    root = Path(buildah("mount", container))
    suite = _SUITES[sys.version_info[:2]]
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, suite, str(root), *mirror]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
    assert done.returncode == 0, done.stdout[-3000:]
    for inside in ("python3 -m venv /opt/venv", "/opt/venv/bin/python -m pip uninstall -qy setuptools"):
        subprocess.run(["chroot", str(root), *inside.split()], check=True, timeout=300)
    settings_of_pip(root)
    path = "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--env", f"PATH={path}", container)
    buildah("commit", "--format=docker", container, BARE)
    say(began, f"{suite} by debootstrap, and a virtual environment")
    found = of_the_base()
    (site,) = (root / "opt" / "venv").glob("lib/python*/site-packages")
    files = copy_packages(found, site)
    buildah("umount", container)
    buildah("commit", "--format=docker", "--rm", container, BASE)
    say(began, f"the stand-in for NGC's image: {len(found)} packages, {files} files, {size(buildah, BASE)}")


def size(buildah: Buildah, image: str) -> str:
    return str(json.loads(buildah("images", "--json", image))[0]["size"])


def printed(clone: Path, cwd: Path, *arguments: str, **env: str) -> list[str]:
    """docker's command line as launchers/docker.sh prints it to the user, whom root's directories above are open to."""
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    command = [*user, str(clone / "launchers" / "docker.sh"), "--dry-run", *arguments]
    kept = {
        name: value for name, value in os.environ.items() if name not in ("NEMO_MINITRON_HOME", "HF_HOME")
    }
    done = subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Quoted for bash, which alone reads $'...' back.
    split = ["bash", "-c", f"printf '%s\\0' {done.stdout}"]
    return subprocess.run(split, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def build(
    buildah: Buildah, words: list[str], dockerfile: Path = DOCKERFILE
) -> subprocess.CompletedProcess[str]:
    """`docker build` as buildah's. OCI's own format has no SHELL, docker's has."""
    assert words[:2] == ["docker", "build"], words
    rest = [str(dockerfile) if before == "--file" else word for before, word in pairwise(words[1:])]
    return buildah.ended("build", "--format=docker", "--layers=false", "--pull-never", *rest)


def check_built(buildah: Buildah, done: subprocess.CompletedProcess[str], began: float) -> None:
    """Every instruction was a step, in order, and the image is what they say."""
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    steps = re.findall(r"^STEP (\d+)/(\d+): (\w+)", log, re.MULTILINE)
    words = [word for word, _ in instructions() if word != "ARG"]
    assert [word for _, _, word in steps] == words, steps
    assert steps[-1][0] == steps[-1][1] == str(len(words)), steps
    for line in log.splitlines():
        if re.match(r"STEP|COMMIT|Successfully", line):
            say(began, line[:100])
    config = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    assert "NEMO_MINITRON_PYTHON=python" in config["Env"], config
    assert config["WorkingDir"] == "/workspace", config
    say(began, f"the image: {size(buildah, IMAGE)}")


def checked_out(home: Path) -> Path:
    """The clone's files as they are now, the user's own."""
    clone = home / "clone"
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(
        None, subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    ):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    for name in ("work", "cache", "data"):
        (home / name).mkdir()
    (home / "data" / "there").write_text("")
    for place in (clone, home / "work", home / "cache", home / "data"):
        subprocess.run(["chown", "-R", f"{USER}:{USER}", str(place)], check=True)
        subprocess.run(["chmod", "-R", "u+rwX", str(place)], check=True)
    return clone


class InImage:
    """Commands in the image, typed by the user in the clone or beside it: in one container, to copy the image once."""

    def __init__(self, buildah: Buildah, home: Path) -> None:
        self.buildah, self.home, self.clone = buildah, home, checked_out(home)
        self.chosen = ("--image", IMAGE, "--gpus", "none", "--mount", f"{home / 'data'}:/data:ro")
        self.containers: dict[str, str] = {}

    def printed(self, cwd: Path, *command: str) -> list[str]:
        return printed(self.clone, cwd, *self.chosen, *command, NEMO_MINITRON_HOME=str(self.home / "cache"))

    def __call__(self, cwd: Path, *command: str) -> str:
        words = self.printed(cwd, *command)
        made, given, _ = translated(words)
        if str(made) not in self.containers:
            self.containers[str(made)] = self.buildah("from", "--pull-never", *made, IMAGE)
        container = self.containers[str(made)]
        given += [option for option in made if option.startswith("--network=")]
        inside = words[words.index(IMAGE) + 1 :]
        done = self.buildah.ended("run", *given, container, "--", *inside, limit=_RUN_S)
        assert done.returncode == 0, (
            f"{shlex.join(command)[:200]}: {done.stdout[-3000:]}{done.stderr[-5000:]}"
        )
        return done.stdout


def check_probe(inside: InImage, began: float) -> None:
    """Packages, user, places, limits and mounts are as docker.sh asked for."""
    work = inside.home / "work"
    found: dict[str, Any] = json.loads(inside(work, "python", "-c", _PROBE).splitlines()[-1])
    assert found["user"] == f"{USER}:{USER}", found
    assert found["cwd"] == str(work), found
    assert Path(found["package"]).is_relative_to(inside.clone), found
    assert found["environment"]["HOME"] == "/tmp", found
    assert found["environment"]["NEMO_MINITRON_HOME"] == str(inside.home / "cache"), found
    assert (found["data"], found["data_written"]) == (["there"], False), found
    made, _, left = translated(inside.printed(work, "true"))
    limits = {"memlock": found["memlock"], "stack": found["stack"]}
    asked = [option.removeprefix("--ulimit=").split("=") for option in made if option.startswith("--ulimit=")]
    assert all(limits[name] == int(value) for name, value in asked), (limits, asked)
    say(
        began,
        f"imported as {found['user']} by {found['python']}: torch {found['torch']}, NeMo-Aligner, Optuna, cma",
    )
    say(began, f"not taken here: {' '.join(left)}; /dev/shm is the machine's, {found['shm'] / 2**30:.0f} GiB")


def check_recipes(inside: InImage, began: float) -> None:
    """A recipe's help in the clone, and a pruning by two ranks in another directory."""
    assert "+conf=width" in inside(inside.clone, "python", "recipes/prune.py", "--help")
    say(began, "python recipes/prune.py --help")
    work = inside.home / "work"
    launcher, recipe = (str(inside.clone / x) for x in ("launchers/local.sh", "recipes/prune.py"))
    layout = "trainer.tensor_model_parallel_size=2"
    told = inside(work, launcher, "--nproc", "2", recipe, "+conf=width", layout)
    result = json.loads(Path(told.splitlines()[-1]).read_text())
    owners = {path.lstat().st_uid for path in (work, *work.rglob("*"))}
    assert owners == {USER}, owners
    losses = " -> ".join(f"{result[f'lm_loss_nats_{when}']:.3f}" for when in ("before", "after"))
    say(began, f"launchers/local.sh --nproc 2 recipes/prune.py +conf=width {layout}: LM loss {losses}")


def check_refused(buildah: Buildah, inside: InImage, began: float) -> None:
    """Neither a base without NeMo, nor another torch among what is installed, makes an image."""
    bare = build(
        buildah, printed(inside.clone, inside.clone, "--image", "localhost/x", "--base", BARE, "build")
    )
    assert bare.returncode, bare.stdout
    assert "the base image has no torch" in bare.stdout + bare.stderr, bare.stderr
    say(began, "refused: a base without torch, megatron-core and NeMo")
    (torch,) = (x for x in of_the_base() if x.metadata["Name"] == "torch")
    other = inside.home / "Dockerfile"
    text, changes = re.subn(
        r" cma==", rf" 'torch!={torch.version.partition('+')[0]}' cma==", DOCKERFILE.read_text()
    )
    assert changes == 1
    other.write_text(text)
    words = printed(inside.clone, inside.clone, "--image", "localhost/x", "--base", BASE, "build")
    done = build(buildah, words, other)
    log = done.stdout + done.stderr
    assert done.returncode, log
    assert f"< torch=={torch.version}" in log, log[-3000:]
    assert "pip replaced what the base image brings" in log, log[-3000:]
    (new,) = re.findall(r"^> torch==(\S+)", log, re.MULTILINE)
    assert "localhost/x" not in buildah("images"), "an image was left"
    say(began, f"refused: torch {new} in place of {torch.version}")


def campaign(home: Path, mirror: list[str]) -> None:
    began, buildah = time.monotonic(), Buildah(home)
    make_base(buildah, mirror, began)
    inside = InImage(buildah, home)
    words = printed(inside.clone, inside.clone, "--image", IMAGE, "--base", BASE, "build")
    check_built(buildah, build(buildah, words), began)
    check_probe(inside, began)
    check_recipes(inside, began)
    check_refused(buildah, inside, began)


def clear(home: Path) -> None:
    """Removes the directory; what debootstrap may have left mounted below it goes first."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for place in sorted((x for x in mounted if Path(x).is_relative_to(home)), reverse=True):
        subprocess.run(["umount", place], check=True)
    shutil.rmtree(home)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--home", type=Path, required=True, help="a directory that is not there; removed at the end"
    )
    parser.add_argument("--keep", action="store_true", help="keep it, with the images")
    parser.add_argument("--mirror", help="debootstrap's, for another than Debian's own")
    a = parser.parse_args()
    home = a.home.resolve()
    if home.exists():
        parser.error(f"--home {a.home}: is there already")
    why = missing(home)
    if why:
        print(f"the image was not built: {why}", flush=True)
        return NOT_RUN
    home.mkdir(parents=True)
    try:
        campaign(home, [a.mirror] if a.mirror else [])
    finally:
        if not a.keep:
            clear(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
